"""Entries of an optimizer's state in blocks of few bits: read as float32, written back with one rounding.

bitsandbytes keeps codes beside their ``absmax`` and ``qmap``; torchao a tensor of a class of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers.sharding import local_shard

_BNB_BLOCK = 256  # entries; bitsandbytes' optimizers know no other


class Blocks(NamedTuple):
    """One entry, of codes in blocks of ``size`` values with a scale each; what is on this process of it."""

    codes: Tensor  # in the order of the values, two to a byte where they have 4 bits
    scales: Tensor  # (blocks,), float32
    size: int
    read: Callable[[], Tensor]  # float32, of the parameter's shape
    write: Callable[[Tensor], Any]  # rounds to the nearest code, with the library's own function

    def scale_(self, factor: Tensor) -> None:
        """Multiply in place by what broadcasts against the values: one rounding, none of blocks with one factor."""
        values = self.read()
        factor = factor.to(values)
        spread = factor.expand(values.shape).reshape(-1)
        short = -len(spread) % self.size
        spread = torch.cat([spread, spread[-1:].expand(short)]).view(-1, self.size)
        alike = (spread == spread[:, :1]).all(1)
        codes, scales = (part.clone() for part in (self.codes, self.scales))
        self.write(values * factor)
        # A library's rounding moves even what is left as it was: the largest of a block may have no code of its own.
        bits = self.codes.view(torch.uint8)
        kept = alike.repeat_interleave(self.size * len(bits.view(-1)) // values.numel())[: bits.numel()].view_as(bits)
        bits.copy_(torch.where(kept, codes.view(torch.uint8), bits))
        self.scales.copy_(torch.where(alike, scales * spread[:, 0], self.scales))


def quantised(state: Mapping[str, Any], key: str) -> list[Blocks]:
    """The blocks of one entry of a parameter's state; none where it is no quantised one. AdEMAMix keeps two in one."""
    value = local_shard(state[key]) if isinstance(state[key], Tensor) else None
    if value is None:
        return []
    if hasattr(value, "codes") and hasattr(value, "dequantize"):  # torchao's OptimState8bit, 4bit, Fp8
        entry: Any = value
        return [Blocks(entry.codes, entry.scale, entry.block_size, entry.dequantize, entry.copy_)]
    absmax = state.get(f"absmax{key[-1]}")
    if value.dtype != torch.uint8 or absmax is None:
        return []
    code = state[f"qmap{key[-1]}"]
    if absmax.ndim == 1:
        return [_bitsandbytes(value, absmax, code)]
    return [_bitsandbytes(*each, code) for each in zip(value.unbind(0), absmax.unbind(0), strict=True)]


def _bitsandbytes(codes: Tensor, absmax: Tensor, code: Tensor) -> Blocks:
    functions: Any = torch.ops.bitsandbytes

    def read() -> Tensor:
        # Paged codes lie in memory that torch takes for the processor's.
        return functions.dequantize_blockwise(codes.to(absmax.device), absmax, code, _BNB_BLOCK, torch.float32)

    def write(values: Tensor) -> None:
        rounded, largest = functions.quantize_blockwise(values.contiguous(), code, _BNB_BLOCK)
        codes.copy_(rounded)
        absmax.copy_(largest)

    return Blocks(codes, absmax, _BNB_BLOCK, read, write)
