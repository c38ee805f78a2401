"""A plain accelerate loop: attach finds the torch optimizer inside accelerate's wrapper."""

import pytest
import torch
from accelerate import Accelerator

import scalora
from helpers import models
from scalora import ScaLoraConfig


def test_attach_unwraps_accelerates_optimizer_and_counts_real_steps_only():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-3)
    model, wrapped = accelerator.prepare(model, optimizer)
    handle = scalora.attach(model, wrapped, ScaLoraConfig(interval=2))
    assert handle.optimizer is optimizer
    for step in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(**models.batch("llama", step)).loss)
            accelerator.clip_grad_norm_(models.trainable(model), 1.0)
            wrapped.step()
            wrapped.zero_grad()
    assert handle.step == 4
    assert [event.step for event in handle.stats] == [0, 2]


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
@pytest.mark.parametrize("order", ["attached before prepare", "attached after prepare"])
def test_save_state_and_load_state_continue_bitwise(tmp_path, accumulate, order):
    config = ScaLoraConfig(interval=2, accumulate=accumulate)

    def begin():
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = models.lora("llama")
        optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
        if order == "attached before prepare":
            handle = scalora.attach(model, optimizer, config)
            model, optimizer = accelerator.prepare(model, optimizer)
        else:
            model, optimizer = accelerator.prepare(model, optimizer)
            handle = scalora.attach(model, optimizer, config)
        accelerator.register_for_checkpointing(handle)
        return accelerator, model, optimizer, handle

    def run(accelerator, model, optimizer, steps):
        for step in steps:
            accelerator.backward(model(**models.batch("llama", step)).loss)
            optimizer.step()
            optimizer.zero_grad()

    accelerator, model, optimizer, handle = begin()
    run(accelerator, model, optimizer, range(7))
    accelerator.save_state(str(tmp_path / "state"))
    run(accelerator, model, optimizer, range(7, 14))

    again, resumed, its_optimizer, its_handle = begin()
    again.load_state(str(tmp_path / "state"))
    assert its_handle.step == 7
    run(again, resumed, its_optimizer, range(7, 14))
    assert torch.equal(models.logits(resumed, "llama"), models.logits(model, "llama"))
    assert its_handle.stats == handle.stats
    for name, (alpha, beta) in handle.factors.items():
        assert all(torch.equal(a, b) for a, b in zip((alpha, beta), its_handle.factors[name], strict=True))
