"""Small models whose first layer is an embedding or a convolution, with LoRA on it and on a linear head."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scalora
from helpers import models
from scalora import ScaLoraConfig


class _Scaled(nn.Embedding):
    """As Gemma's."""

    embed_scale = torch.tensor(3.0)

    def forward(self, input):
        return super().forward(input) * self.embed_scale


class Words(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first, self.head = first, nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x).mean(1)))


class Images(Words):
    def forward(self, x):
        return self.head(torch.tanh(self.first(x).flatten(2).mean(2)))


def _tokens(seed):
    return torch.randint(0, 20, (12, 6), generator=torch.Generator().manual_seed(seed))


def values(*shape):
    return lambda seed: torch.randn(12, *shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "embedding": (lambda: Words(nn.Embedding(20, 8)), _tokens),
    "embedding-padding": (lambda: Words(nn.Embedding(20, 8, padding_idx=0)), _tokens),
    "embedding-scaled": (lambda: Words(_Scaled(20, 8)), _tokens),
    "conv1d": (lambda: Images(nn.Conv1d(3, 8, 3, padding=1)), values(3, 10)),
    "conv2d": (lambda: Images(nn.Conv2d(3, 8, (3, 2), stride=2, padding=1)), values(3, 8, 8)),
    "conv2d-pointwise": (lambda: Images(nn.Conv2d(6, 8, 1)), values(6, 5, 5)),
    "conv2d-circular": (lambda: Images(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")), values(3, 6, 6)),
    "conv2d-channels-last": (
        lambda: Images(nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last),
        values(3, 6, 6),
    ),
    "conv3d": (lambda: Images(nn.Conv3d(2, 8, 2)), values(2, 4, 5, 4)),
}


def base(kind):
    torch.manual_seed(1)
    return in_layout(kind, KINDS[kind][0]())


def in_layout(kind, model):
    return model.to(memory_format=torch.channels_last) if "last" in kind else model


def lora(kind, **options):
    made = base(kind)
    torch.manual_seed(2)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["first", "head"], **options})
    return in_layout(kind, get_peft_model(made, config))


def train(model, optimizer, kind, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        loss = nn.functional.cross_entropy(model(KINDS[kind][1](step % 2)), torch.arange(12) % 5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def outputs(model, kind):
    return model(KINDS[kind][1](99))


def watched(handle, model, kind):
    """How much each event changes the outputs."""
    changes, inner = [], handle.rescale

    def event():
        before = outputs(model, kind)
        inner()
        changes.append((outputs(model, kind) - before).abs().max().item())

    handle.rescale = event
    return changes


def trained(kind, steps=12, lora_options=None, **config):
    model = lora(kind, **(lora_options or {}))
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(**{"interval": 1, **config}))
    changes = watched(handle, model, kind)
    losses = train(model, optimizer, kind, steps)
    return model, optimizer, handle, changes, losses
