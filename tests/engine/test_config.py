import dataclasses

import pytest
import torch

import scalora
from helpers import models
from scalora import ScaLoraConfig, ScaloraError
from scalora.engine.config import MOST


def test_defaults_and_help():
    config = ScaLoraConfig()
    assert (config.interval, config.scaling, config.lipschitz) == (10, "paper", None)
    assert (config.accumulate, config.capacity, config.floor) == ("adapter", None, 1e-2)
    assert all(len(field.metadata["help"]) > 20 for field in dataclasses.fields(config))
    (refresh,) = (field for field in dataclasses.fields(config) if field.name == "refresh")
    assert f"a quarter of the run, {MOST} at most" in refresh.metadata["help"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.interval = 3  # pyright: ignore


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interval", 0), ("interval", 1.5), ("interval", True), ("interval", "10"),
        ("scaling", "papre"), ("accumulate", "nowhere"), ("accumulate", None),
        ("lipschitz", 0), ("lipschitz", -1.0), ("lipschitz", float("nan")), ("lipschitz", "1"),
        ("refresh", 2.5), ("refresh", "often"), ("capacity", 0), ("capacity", 2.5), ("floor", 0),
        ("floor", 1), ("floor", float("inf")),
    ],
)  # fmt: skip
def test_bad_values_are_named(field, value):
    with pytest.raises(ScaloraError, match=f"^{field} is {value!r}"):
        ScaLoraConfig(**{field: value})


def test_capacity_makes_no_sense_without_an_adapter():
    with pytest.raises(ScaloraError, match="capacity"):
        ScaLoraConfig(accumulate="base", capacity=8)


def test_where_nobody_tells_the_length_of_the_run_auto_is_refused_and_nothing_changed():
    model = models.lora("llama")
    with pytest.raises(
        ScaloraError, match="refresh is 'auto', a quarter of the run, whose length only a Trainer tells"
    ):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)), ScaLoraConfig(interval=None, refresh="auto"))
    assert not any(hasattr(module, "attached") for module in model.modules())
