"""An optimizer that was detached in white coordinates: its means of gradients are of these, wherever it goes on."""

from typing import Any

import pytest
import torch

import scalora
from helpers import models
from scalora import ScaLoraConfig, ScaloraError

WHITE = ScaLoraConfig(coordinates="white", interval=None)


def _trained(steps=4):
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-3)
    handle = scalora.attach(model, optimizer, WHITE)
    for i in range(steps):
        _pass(model, optimizer, i)
        optimizer.step()
    return model, optimizer, handle


def _pass(model, optimizer, i):
    optimizer.zero_grad()
    model(**models.batch("llama", i)).loss.backward()


def _plain_means(handle, optimizer):
    """Of each layer, what the means of gradients are in plain coordinates: N m, for A."""
    moments = handle.white.moments
    return [
        moments.of(i).outputs.color(optimizer.state[layer.A]["exp_avg"]).clone()
        for i, layer in enumerate(handle.layers)
    ]


def test_attached_again_it_goes_on_from_its_coordinates():
    model, optimizer, handle = _trained()
    before = _plain_means(handle, optimizer)
    handle.detach()
    again: Any = scalora.attach(model, optimizer, WHITE)
    _pass(model, optimizer, 9)
    known = [white.inputs.e for white in again.white.moments.white]
    again.white.before_step(0)  # the first look has ended: other coordinates, and the means turn along
    assert not torch.equal(known[0], again.white.moments.white[0].inputs.e)
    for one, other in zip(before, _plain_means(again, optimizer), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def test_the_run_goes_on_as_if_it_had_not_been_detached():
    whole, broken = _trained(), _trained()
    broken[2].detach()
    scalora.attach(broken[0], broken[1], WHITE)
    moved = []
    for model, optimizer, _ in (whole, broken):
        before = [p.detach().clone() for p in models.trainable(model)]
        _pass(model, optimizer, 9)
        optimizer.step()
        moved.append(
            torch.cat([(p.detach() - b).flatten() for p, b in zip(models.trainable(model), before, strict=True)])
        )
    # It looks once more, at this pass, and the other does not.
    assert 0.7 < float(moved[1].norm() / moved[0].norm()) < 1.4
    assert float(torch.cosine_similarity(*moved, dim=0)) > 0.9


def test_other_coordinates_are_refused():
    model, optimizer, handle = _trained()
    handle.detach()
    for config, said in (
        (ScaLoraConfig(), "white coordinates.*a new optimizer, or with coordinates='white'"),
        (ScaLoraConfig(coordinates="white", interval=None, exponent=0.5), "another exponent.*a new optimizer"),
    ):
        with pytest.raises(ScaloraError, match=said):
            scalora.attach(model, optimizer, config)
    scalora.attach(model, torch.optim.AdamW(models.trainable(model)), ScaLoraConfig()).detach()
    scalora.attach(model, optimizer, WHITE)  # what was refused has changed nothing


def test_an_optimizer_that_made_no_step_is_free():
    model, optimizer, handle = _trained(0)
    handle.detach()
    scalora.attach(model, optimizer, ScaLoraConfig(coordinates="white", interval=None, exponent=0.5)).detach()
    scalora.attach(model, optimizer, ScaLoraConfig())
