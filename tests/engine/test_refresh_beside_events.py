"""Refreshes beside rescalings, and beside layers that are frozen or not used in a step."""

import copy

import pytest
import torch

import scalora
from helpers import models
from scalora import ScaLoraConfig


@pytest.mark.parametrize("coordinates", ["plain", "white"])
@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_columns_that_are_rescaled_in_a_shortened_step_keep_the_function(accumulate, coordinates):
    model = models.lora("llama", r=2)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
    config = ScaLoraConfig(interval=1, refresh=12, accumulate=accumulate, coordinates=coordinates)
    handle = scalora.attach(model, optimizer, config)
    models.train(model, optimizer, "llama", 13)
    assert handle.refresh.since < handle.refresh.warmup - 1  # the next step is shortened too
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the event alone
    before = models.logits(model, "llama")
    models.train(model, optimizer, "llama", 1, start=13)
    assert [event.step for event in handle.stats][-1] == 13
    assert handle.stats[-1].moved > 1e-3
    assert (models.logits(model, "llama") - before).abs().max() < 1e-5


def _norm(model):
    return torch.stack([p.grad.norm() for p in models.trainable(model) if p.grad is not None]).norm()


@pytest.mark.parametrize("idle", ["frozen", "unused"])
def test_gradients_keep_their_norm_where_a_layer_has_none(idle):
    """A frozen layer keeps its adapters too; one that is not used in just this step is refreshed."""
    model = models.lora("llama", r=2)
    optimizer = torch.optim.SGD(models.trainable(model), lr=0.1)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=None, refresh=4))
    models.train(model, optimizer, "llama", 4)
    layer, inner, norms = handle.layers[1], handle.refresh.refresh, []
    if idle == "frozen":
        layer.A.requires_grad_(False)
        layer.Bt.requires_grad_(False)

    def refresh(*sketches):
        norms.append(_norm(model))
        inner(*sketches)
        norms.append(_norm(model))

    handle.refresh.refresh = refresh
    before = layer.A.detach().clone()
    model(**models.batch("llama", 4)).loss.backward()
    layer.A.grad = layer.Bt.grad = None
    optimizer.step()
    assert handle.refresh.steps == [4]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=0)
    assert torch.equal(layer.A, before) == (idle == "frozen")


def test_a_run_can_be_set_back_to_one_state_twice():
    """What is gathered after it was loaded does not reach the state that the loop still holds."""
    model = models.lora("llama", r=2)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=3, refresh=6))
    models.train(model, optimizer, "llama", 8)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict())), handle.state_dict()
    ends = []
    for _ in range(3):
        models.train(model, optimizer, "llama", 6, start=8)
        ends.append(models.logits(model, "llama"))
        (weights, moments), ours = state
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(moments))  # torch's own go on in the tensors that they are given
        handle.load_state_dict(ours)
    assert torch.equal(ends[1], ends[0])
    assert torch.equal(ends[2], ends[0])
