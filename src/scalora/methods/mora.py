"""MoRA (2405.12130): one square matrix between a fixed compression of the input and a fixed spread of the output."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.heads import Head
from .method import Adapted, Family, Method
from .support.wrappers import Wrapper, save_wrapped, wrap_linear, wrapped_spectra


class MoraOptions(BaseModel):
    """Options of :class:`Mora`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal[1, 6] = Field(
        default=6,
        description="6: blocks of the input rotated by RoPE, each through M (the paper's choice for small ranks); "
        "1: blocks summed, M once, its output repeated.",
    )


class MoraLinear(Wrapper):
    """A linear layer n → m with r̂ = ⌊√((m+n)·r) + ½⌋ and M (r̂×r̂); type 6 makes r̂ even. There is no alpha."""

    cos: Tensor
    sin: Tensor

    def __init__(self, base: nn.Linear, rank: int, type: Literal[1, 6], dropout: float = 0.0) -> None:
        super().__init__(base)
        size = int(math.sqrt((base.in_features + base.out_features) * rank) + 0.5)
        self.size = max(2, size // 2 * 2) if type == 6 else size
        self.kind = type
        self.blocks = -(-base.in_features // self.size)
        self.M = nn.Parameter(torch.zeros(self.size, self.size))
        self.dropout = nn.Dropout(dropout)
        angles = rope_angles(self.blocks, self.size) if type == 6 else torch.zeros(0)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, n) → (…, m)."""
        y = self.base(x)
        return y + self.update(self.dropout(x.to(self.M.dtype))).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """decompress(M·compress(x)): (…, n) → (…, m)."""
        blocks = repeat_to(x, self.blocks * self.size).unflatten(-1, (self.blocks, self.size))
        if self.kind == 1:
            h = nn.functional.linear(blocks.sum(-2), self.M)
        else:
            half = self.size // 2
            turned = torch.cat([-blocks[..., half:], blocks[..., :half]], -1)
            h = nn.functional.linear(blocks * self.cos + turned * self.sin, self.M).flatten(-2)
        return repeat_to(h, self.base.out_features)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        # The update is linear in x: its matrix is what it does to the unit vectors.
        update = self.update(torch.eye(self.base.in_features, device=self.M.device)).T
        return self.base.weight.float() + update, self.base.bias


class Mora(Method):
    """W + decompress(M·compress(·)), M square, zero at the start, as many entries as LoRA of the recipe's rank has."""

    name = "mora"
    summary = "MoRA (2405.12130): one square matrix in LoRA's number of parameters"
    family = Family.LAYERS
    packed = ()
    Options = MoraOptions
    Wrapper = MoraLinear
    has_alpha = False

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, MoraOptions)
        rank, kind, dropout = self.spec.rank, self.options.type, self.spec.dropout
        wrappers = wrap_linear(model, self.spec, head, lambda base: MoraLinear(base, rank, kind, dropout))
        return Adapted(
            model,
            lambda path: save_wrapped(model, wrappers, head, path, self.name, rank=rank, type=kind),
            lambda: wrapped_spectra(wrappers),
        )


def repeat_to(x: Tensor, size: int) -> Tensor:
    """The last dimension repeated from its beginning, or cut off, to ``size``."""
    times = -(-size // x.shape[-1])
    return torch.cat([x] * times, -1)[..., :size] if times > 1 else x[..., :size]


def rope_angles(positions: int, size: int) -> Tensor:
    """Rotary angles (positions, size) with base 10000, the two halves alike (rotate-half)."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    return torch.outer(torch.arange(positions).float(), frequencies).repeat(1, 2)


METHODS = (Mora,)
