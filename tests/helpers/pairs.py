"""One pair of LoRA's matrices around a linear layer, in float64, with gradients given to it by hand."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from scalora.layers.peft_lora import find_layers


def pair(m, n, r, seed=0, s=2.0, dtype=torch.float64):
    """A PEFT model of one layer m×n, both matrices random; and that layer."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(n, m, bias=False)), LoraConfig(r=r, lora_alpha=s * r, target_modules=["0"])
    ).to(dtype)
    (layer,) = find_layers(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_A.normal_(generator=generator)
        layer.lora_B.normal_(generator=generator)
    return model, layer


def arguments(folder="unused", **options):
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **options)


def update(layer):
    """s·BA."""
    return layer.scale * (layer.lora_B @ layer.lora_A).detach()


def give(layer, G):
    """The gradients of both matrices where that of W is G."""
    with torch.no_grad():
        layer.lora_B.grad = layer.scale * G @ layer.lora_A.T
        layer.lora_A.grad = layer.scale * layer.lora_B.T @ G


def gradients(m, n, count, seed=0):
    """As many random G."""
    return torch.randn(count, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def descend(optimizer, layer, grads):
    """One step for each G; the updates after each."""
    updates = []
    for G in grads:
        give(layer, G)
        optimizer.step()
        updates.append(update(layer))
    return updates
