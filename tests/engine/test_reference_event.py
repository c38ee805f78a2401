"""The event of all layers at once against Algorithm 1 one layer after the other."""

import copy

import torch

from helpers import models
from helpers.attached import attached
from scalora.algebra.reference import rescale_layer
from scalora.layers.peft_lora import find_layers


def test_the_event_is_algorithm_1_in_a_loop():
    model, optimizer, handle = attached(dtype=torch.float64, accumulate="base", lora={"r": 6, "lora_alpha": 12})
    models.train(model, optimizer, "llama", 3)
    model(**models.batch("llama", 7)).loss.backward()
    slow = copy.deepcopy(model)
    slow_optimizer = torch.optim.AdamW(models.trainable(slow), lr=3e-3)
    slow_optimizer.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(models.trainable(slow), models.trainable(model), strict=True):
        mine.grad = theirs.grad.clone()
    handle.rescale()
    for layer, c in zip(find_layers(slow), handle.constants, strict=True):
        alpha, beta = rescale_layer(layer.base_weight, layer.A, layer.Bt, slow_optimizer, layer.scale, float(c))
        torch.testing.assert_close(handle.factors[layer.name], (alpha, beta), rtol=1e-6, atol=1e-9)
    assert handle.stats[-1].shares.keys() == {"column", "scalar"}  # both theorems
    for fast, loop in zip(handle.layers, find_layers(slow), strict=True):
        torch.testing.assert_close(fast.base_weight, loop.base_weight, rtol=1e-9, atol=1e-12)
        for mine, theirs in ((fast.A, loop.A), (fast.Bt, loop.Bt)):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-12)
            state, reference = optimizer.state[mine], slow_optimizer.state[theirs]
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(state[key], reference[key], rtol=1e-6, atol=1e-15)
