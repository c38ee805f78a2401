"""How far white coordinates go: what is refused, what is resumed, and what a state of before is taken for."""

import copy

import pytest
import torch

import scalora
from helpers import models
from scalora import ScaLoraConfig, ScaloraError

EVENTS = {"no events": {"interval": None}, "rescaled": {"interval": 2}, "refreshed": {"interval": None, "refresh": 4}}


def attached(config):
    model = models.lora("llama", torch.float32, 2, r=2)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-3)
    return model, optimizer, scalora.attach(model, optimizer, ScaLoraConfig(coordinates="white", **config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"exponent": 0.6}, "exponent is 0.6: it must be more than 0, and 0.5 at most"),
        ({"exponent": 0}, "exponent is 0: it must be more than 0, and 0.5 at most"),
        ({"exponent": "half"}, "exponent is 'half': it must be more than 0"),
        (
            {"exponent": 0.5, "coordinates": "plain", "interval": 1},
            "exponent is 0.5, but coordinates is 'plain', which has none: set coordinates='white', or leave",
        ),
    ],
)
def test_an_exponent_out_of_range_is_refused(config, message):
    with pytest.raises(ScaloraError, match=message):
        ScaLoraConfig(**{"interval": None, "coordinates": "white", **config})


def test_a_run_in_other_coordinates_is_not_gone_on_with():
    model, optimizer, handle = attached({"interval": None, "exponent": 0.375})
    models.train(model, optimizer, "llama", 2)
    state = handle.state_dict()
    model, optimizer, handle = attached({"interval": None})
    with pytest.raises(ScaloraError, match=r"exponent is 0\.25, but the saved run had 0\.375: resume"):
        handle.load_state_dict(state)


def test_a_state_of_before_the_exponent_could_be_set_is_gone_on_with_where_it_was_this_one():
    model, optimizer, handle = attached({"interval": None})
    models.train(model, optimizer, "llama", 2)
    state = handle.state_dict()
    del state["config"]["exponent"]
    handle.load_state_dict(state)
    del state["white"]["exponent"]  # as before that: ½, with another damping
    with pytest.raises(ScaloraError, match=r"the saved run's white coordinates have the exponent 0\.5"):
        handle.load_state_dict(state)


@pytest.mark.parametrize("events", EVENTS)
def test_resuming_with_another_exponent_is_bitwise(events):
    config = EVENTS[events] | {"exponent": 0.5}
    model, optimizer, handle = attached(config)
    models.train(model, optimizer, "llama", 5)
    kept = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, handle)]
    models.train(model, optimizer, "llama", 4, start=5)
    again, fresh, other = attached(config)
    for part, state in zip((again, fresh, other), kept, strict=True):
        part.load_state_dict(state)
    models.train(again, fresh, "llama", 4, start=5)
    assert all(torch.equal(p, q) for p, q in zip(models.trainable(model), models.trainable(again), strict=True))
