"""NormalFloat of 4 bits with its scales quantised too, as QLoRA (arXiv 2305.14314) has it: 4.13 bits a weight.

Row after row, 64 weights share a scale, the largest of their magnitudes; a weight is the nearest of sixteen levels
times that scale. The scales, less their mean, are kept in 8 bits: 256 of them share a scale of their own, and each is
the nearest of 256 levels of a dynamic tree (Dettmers, arXiv 1511.04561) times that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK, SCALES_BLOCK = 64, 256
# Quantiles of the standard normal distribution, in two halves around an exact zero: the paper's, Appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NF4(NamedTuple):
    """A quantised matrix."""

    codes: Tensor  # uint8, two weights a byte, the first in the upper half
    scales: Tensor  # uint8, one a block of 64
    scales_of_scales: Tensor  # float32, one a block of 256 scales
    mean_scale: Tensor  # float32, 0-dim


def to_nf4(W: Tensor) -> NF4:
    """Quantise a tensor of any shape, computed in float32 where it lies."""
    flat = W.detach().float().flatten()
    blocks = _blocks(flat, BLOCK)
    largest = blocks.abs().amax(1)
    unit = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = _nearest(unit, torch.tensor(LEVELS, device=W.device)).flatten()[: len(flat)]
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])

    mean = largest.mean()
    centred = _blocks(largest - mean, SCALES_BLOCK)
    most = centred.abs().amax(1)
    scales = _nearest(centred / most.clamp(min=torch.finfo(torch.float32).tiny)[:, None], _dynamic_levels(W.device))
    return NF4(codes[::2] * 16 + codes[1::2], scales.flatten()[: len(largest)], most, mean)


def from_nf4(quantised: NF4, like: Tensor) -> Tensor:
    """What :func:`to_nf4` has kept, in the shape and dtype of ``like``, on its device."""
    codes, scales, most, mean = (part.to(like.device) for part in quantised)
    both = torch.stack([codes // 16, codes % 16], 1).flatten()[: like.numel()]
    largest = _dynamic_levels(like.device)[scales.int()] * most.repeat_interleave(SCALES_BLOCK)[: len(scales)] + mean
    unit = torch.tensor(LEVELS, device=like.device)[both.int()]
    return (unit * largest.repeat_interleave(BLOCK)[: len(unit)]).view(like.shape).to(like.dtype)


def nf4_rounded(W: Tensor) -> Tensor:
    """W as it is after NF4: quantised and dequantised, of the same shape and dtype."""
    return from_nf4(to_nf4(W), W)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """(count, size), filled up with zeros."""
    count = math.ceil(len(flat) / size)
    return torch.nn.functional.pad(flat, (0, count * size - len(flat))).view(count, size)


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of ascending levels, uint8."""
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _dynamic_levels(device: torch.device) -> Tensor:
    """256 ascending numbers from −0.993 to 1: a sign, a power of ten by leading zeros, and a linear fraction."""
    parts = [torch.linspace(0.1, 1, 2**bits + 1).unfold(0, 2, 1).mean(1) * 10.0 ** (bits - 6) for bits in range(7)]
    positive = torch.cat(parts)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values.to(device)
