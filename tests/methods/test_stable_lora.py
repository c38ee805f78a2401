"""Stable-LoRA: when it shrinks, by how much, and that it stops at the balance, also over a restart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import models, training
from scalora.layers.peft_lora import find_layers
from scalora.methods.stable_lora import StableLoraCallback, StableLoraOptions


def _by_hand(shrink, optimizer=None):
    model = models.lora("llama")
    callback = StableLoraCallback(model, StableLoraOptions(shrink=shrink))
    callback.layers = find_layers(model)
    callback.optimizer = torch.optim.AdamW(models.trainable(model), lr=0.0)
    callback.begin(None, 10)
    return callback


@given(
    shrink=st.floats(0.001, 0.5),
    growths=st.lists(st.tuples(st.floats(0.8, 2.0), st.floats(0.8, 3.0)), min_size=1, max_size=12),
)
def test_it_is_the_definition_step_by_step(shrink, growths):
    """Both matrices go their way between steps; who has stopped once never shrinks again, whatever they do."""
    callback = _by_hand(shrink)
    expected = {}
    with torch.no_grad():
        for i, layer in enumerate(callback.layers):
            torch.nn.init.normal_(layer.lora_B, std=10.0 ** (i % 4 - 4))
            expected[layer.name] = [layer.lora_A.clone(), True]
        for of_A, of_B in growths:
            for layer in callback.layers:
                known = expected[layer.name]
                (r, n), m = layer.lora_A.shape, layer.lora_B.shape[0]
                assert r == layer.rank
                known[1] = known[1] and bool(known[0].norm() / n >= layer.lora_B.norm() / m)
                known[0] = known[0] * (1 - shrink * known[1])
            callback.before()
            for layer in callback.layers:
                torch.testing.assert_close(layer.lora_A.detach(), expected[layer.name][0], rtol=1e-5, atol=1e-9)
                layer.lora_A.mul_(of_A)
                layer.lora_B.mul_(of_B)
                expected[layer.name][0] = layer.lora_A.clone()


def test_it_stops_at_the_balance():
    callback = _by_hand(0.02)
    with torch.no_grad():
        for layer in callback.layers:
            torch.nn.init.normal_(layer.lora_B, std=1e-3)
        for _ in range(400):
            callback.before()
    for layer in callback.layers:
        ratio = (layer.lora_A.norm() / layer.lora_A.shape[1]) / (layer.lora_B.norm() / layer.lora_B.shape[0])
        assert 0.97 < ratio < 1
    assert not any(callback.shrinks)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_first_step_shrinks_a_and_leaves_the_function(kind, tmp_path):
    adapted = training.adapt("stable-lora", kind, tmp_path / "base", options={"shrink": 0.25})
    before = [layer.lora_A.detach().clone() for layer in find_layers(adapted.model)]
    made = training.trainer(adapted, kind, tmp_path / "out", max_steps=1, learning_rate=0.0)
    logits = models.logits(adapted.model, kind)
    made.train()
    for layer, old in zip(find_layers(adapted.model), before, strict=True):
        assert torch.equal(layer.lora_A, 0.75 * old)
    assert torch.equal(models.logits(adapted.model, kind), logits)


def test_who_has_stopped_is_still_known_after_a_restart(tmp_path):
    """The published code begins anew: A would shrink again where Adam has made it outweigh B."""
    callbacks = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-3")):
        adapted = training.adapt("stable-lora", "llama", tmp_path / "base", options={"shrink": 0.3})
        training.trainer(
            adapted, "llama", tmp_path / "out", save_strategy="steps", save_steps=3, learning_rate=5e-3
        ).train(resume_from_checkpoint=resume)
        callbacks.append(adapted.callbacks[0])
        factors = [layer.lora_A.detach().clone() for layer in find_layers(adapted.model)]
        if resume is None:
            uninterrupted = factors
    stopped = [[float(each) for each in callback.shrinks] for callback in callbacks]
    assert stopped[0] == stopped[1]
    assert 0.0 in stopped[0]
    assert all(map(torch.equal, uninterrupted, factors))
