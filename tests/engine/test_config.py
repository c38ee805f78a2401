import dataclasses

import pytest

from scalora import ScaLoraConfig, ScaloraError


def test_defaults_and_help():
    config = ScaLoraConfig()
    assert (config.interval, config.scaling, config.lipschitz) == (10, "paper", None)
    assert (config.accumulate, config.capacity, config.floor) == ("adapter", None, 1e-2)
    assert all(len(field.metadata["help"]) > 20 for field in dataclasses.fields(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.interval = 3  # pyright: ignore


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interval", 0), ("interval", 1.5), ("interval", True), ("interval", "10"),
        ("scaling", "papre"), ("accumulate", "nowhere"), ("accumulate", None),
        ("lipschitz", 0), ("lipschitz", -1.0), ("lipschitz", float("nan")), ("lipschitz", "1"),
        ("capacity", 0), ("capacity", 2.5), ("floor", 0), ("floor", 1), ("floor", float("inf")),
    ],
)  # fmt: skip
def test_bad_values_are_named(field, value):
    with pytest.raises(ScaloraError, match=f"^{field} is {value!r}"):
        ScaLoraConfig(**{field: value})


def test_capacity_makes_no_sense_without_an_adapter():
    with pytest.raises(ScaloraError, match="capacity"):
        ScaLoraConfig(accumulate="base", capacity=8)
