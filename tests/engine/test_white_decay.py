"""Weight decay in white coordinates is what it is in plain ones."""

import optimi
import pytest
import pytorch_optimizer
import torch
import transformers

import scalora
from helpers import models
from scalora import ScaLoraConfig


def lora_plus(model, lr):
    """Matrices of one kind in groups of their own, and one of them in a third."""
    params = models.trainable(model)
    groups = [{"params": params[:1], "lr": lr / 2}, {"params": params[1::2]}, {"params": params[2::2], "lr": 2 * lr}]
    return torch.optim.AdamW(groups, lr=lr)


@pytest.mark.parametrize("optimizer_cls", [lora_plus, torch.optim.AdamW, torch.optim.NAdam])
def test_weight_decay_is_not_whitened(optimizer_cls):
    """Ã = N A decays as A does, so that both lose lr·wd of themselves, whatever the coordinates."""
    kept, lr, decay = [], 1e-2, 0.5
    for rate in (0.0, decay):
        model = models.lora("llama", torch.float64, r=2)
        optimizer = optimizer_cls(model if optimizer_cls is lora_plus else models.trainable(model), lr=lr)
        scalora.attach(model, optimizer, ScaLoraConfig(interval=None, coordinates="white"))
        for step in range(4):
            if step == 3:
                before = [p.detach().clone() for p in models.trainable(model)]
                for group in optimizer.param_groups:
                    group.update(weight_decay=rate, decoupled_weight_decay=True)
            optimizer.zero_grad()
            model(**models.batch("llama", step)).loss.backward()
            optimizer.step()
        kept.append([p.detach().clone() for p in models.trainable(model)])
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for plain, decayed, p, own in zip(*kept, before, models.trainable(model), strict=True):
        torch.testing.assert_close(decayed - plain, -rates[own] * decay * p, atol=1e-9, rtol=1e-6)


def test_a_step_that_the_optimizer_skips_decays_nothing():
    """As a loss scaler has the fused AdamW do where a gradient overflowed."""
    model = models.lora("llama", r=2)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2, weight_decay=0.5, fused=True)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=None, coordinates="white"))
    for overflowed in (None, 0.0, 1.0):  # lora_B waits for the second step
        before = [p.detach().clone() for p in models.trainable(model)]
        model(**models.batch("llama", 0)).loss.backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(overflowed or 0.0)
        optimizer.step()
        same = [torch.equal(p, old) for p, old in zip(models.trainable(model), before, strict=True)]
        assert overflowed is None or all(flag == bool(overflowed) for flag in same)
        optimizer.zero_grad()


def _own_size(p):
    return 1e-2 * max(1e-3, float(p.norm()) / p.numel() ** 0.5)


@pytest.mark.parametrize(
    ("optimizer_cls", "options", "rate"),
    [
        (pytorch_optimizer.Lion, {"lr": 1e-3, "fixed_decay": True}, lambda p: 1.0),
        (optimi.Lion, {"lr": 1e-3, "max_lr": 4e-3, "decouple_lr": True, "weight_decay": 1e-9}, lambda p: 0.25),
        (transformers.Adafactor, {"relative_step": False, "lr": 1e-2}, _own_size),
    ],
)
def test_a_decay_that_is_no_multiple_of_the_learning_rate(optimizer_cls, options, rate):
    kept, decay = [], 0.1
    for value in (0.0, decay):
        model = models.lora("llama", torch.float64, r=2)
        optimizer = optimizer_cls(models.trainable(model), **options)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        scalora.attach(model, optimizer, ScaLoraConfig(interval=None, coordinates="white"))
        models.train(model, optimizer, "llama", 3)
        before = [p.detach().clone() for p in models.trainable(model)]
        for group in optimizer.param_groups:
            group["weight_decay"] = value
        models.train(model, optimizer, "llama", 1, start=3)
        kept.append([p.detach().clone() for p in models.trainable(model)])
    for plain, decayed, p in zip(*kept, before, strict=True):
        torch.testing.assert_close(decayed - plain, -rate(p) * decay * p, atol=1e-8, rtol=1e-3)


def test_rates_that_the_optimizer_makes_itself():
    model = models.lora("llama", r=2)
    optimizer = transformers.Adafactor(models.trainable(model))  # relative_step: lr=None
    scalora.attach(model, optimizer, ScaLoraConfig(interval=None, coordinates="white"))
    models.train(model, optimizer, "llama", 3)
    assert models.logits(model, "llama").isfinite().all()


def test_a_layer_without_a_gradient_decays_as_little_as_in_plain_coordinates():
    model = models.lora("llama", r=2)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2, weight_decay=0.5)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=None, coordinates="white"))
    models.train(model, optimizer, "llama", 3)
    used, idle = handle.layers[0], handle.layers[1]
    for p in (idle.A, idle.Bt):
        p.requires_grad_(False)
    before = [p.detach().clone() for p in (idle.A, idle.Bt, used.A)]
    models.train(model, optimizer, "llama", 2, start=3)
    assert torch.equal(idle.A, before[0])
    assert torch.equal(idle.Bt, before[1])
    assert not torch.equal(used.A, before[2])
