"""The sum of a layer's weight and its frozen columns, formed once for all training passes until one of them changes.

W + Σ s·P Qᵀ is the same from one event to the next. A layer that keeps it pays for its frozen columns once an event
instead of in each pass, and a step costs LoRA's, however few tokens a batch has. The weight itself is never written.
Where an event but appends columns, these alone are added: r of them instead of 8r to 12r.
Where autocast is on, the sum has its dtype: it is what the layer would keep for backward all the same, cast once.

The sum with a weight in half precision is rounded to it, each time from the exact columns, so that nothing adds up.
It comes nearer to the exact function than the output of the rounded weight plus thin products, in which whatever is
smaller than half a step of the output's rounding is lost (benchmarks/studies/rounded_sum.py). Under autocast a sum
with a weight in float32 is rounded once more by each addition, of which there are at most ADDITIONS.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .products import Adapter, row_chunks, summed


class _Made(NamedTuple):
    """A sum and what it was formed of."""

    what: list[Any]
    total: Tensor
    tensors: list[Tensor]  # whose places in memory nothing else takes as long as they are held


class KeptSum:
    """A cache of one sum, which copies and pickles as an empty one.

    What it was formed of is known by identity, place in memory and version, so that no tensor is read for it. A weight
    that is written to through ``.data`` is noticed when the sum is formed anew, or when the model is evaluated.
    """

    def __init__(self, steps: int = 1, half: bool = False) -> None:
        """Of columns that change every so many steps; ``half``: of weights in half precision too."""
        self.steps, self.half = steps, half
        self._made: _Made | None = None  # in one assignment, since replicas share it

    def pays(self, x: Tensor, W: Tensor) -> bool:
        """Whether forming it takes fewer operations than thin products of the frozen columns, three in each step."""
        return 3 * self.steps * (x.numel() // x.shape[-1]) * sum(W.shape) > W.numel()

    def of(self, W: Tensor, frozen: Sequence[Adapter], x: Tensor) -> Tensor:
        """W + Σ s·lora_B lora_A, (m, n), in the dtype of `x` and without gradient.

        Args:
            W: (m, n); a view of the layer's weight.
            frozen: adapters that are not trained.
            x: what is to be multiplied with.
        """
        tensors = [W.detach(), *(matrix.detach() for each in frozen for matrix in (each.lora_A, each.lora_B))]
        what = [x.dtype, *(each.scale for each in frozen), *map(_identity, tensors)]
        made = self._made
        if made is None or made.what != what:
            self._made = None  # what it holds is written over
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                made = self._made = _Made(what, _next(made, what, tensors[0], frozen, x), tensors)
        return made.total

    def drop(self) -> None:
        """Give its memory back."""
        self._made = None

    def __reduce__(self) -> tuple[type[KeptSum], tuple[int, bool]]:
        return KeptSum, (self.steps, self.half)


def formed(W: Tensor, frozen: Sequence[Adapter], x: Tensor, room: Tensor | None = None) -> Tensor:
    """The sum in the dtype of `x`, made in float32 at least and rounded once; in `room`, if that is given."""
    total = torch.empty(W.shape, dtype=x.dtype, device=W.device) if room is None else room
    for rows in row_chunks(W):
        exact = W[rows].float() if W.dtype.itemsize < 4 else W[rows]
        total[rows] = summed(exact, [each._replace(lora_B=each.lora_B[rows]) for each in frozen], exact)
    return total


def _next(made: _Made | None, what: list[Any], W: Tensor, frozen: Sequence[Adapter], x: Tensor) -> Tensor:
    """The sum, by the same additions whether all are made now or most were made before.

    So a run that is resumed, or whose model was evaluated in between, rounds as one that was not. Where nothing but
    what is in the same places has changed, the sum takes the place of the one before: new memory costs a CPU more than
    the addition. Whoever still wants gradients by way of that is told so by autograd, as after an optimizer's step.
    """
    room = made.total if made is not None and _places(made.what) == _places(what) else None
    growing = [i for i, each in enumerate(frozen) if _columns(each)[1:]]
    if len(growing) != 1 or W.dtype.itemsize < 4:
        return formed(W, frozen, x, room)
    i = growing[0]
    ends = _columns(frozen[i])
    if made is not None and made.what == _before(what, frozen, i):
        total, ends = made.total, ends[-2:]
    else:
        total = formed(W, [*frozen[:i], _between(frozen[i], 0, ends[0]), *frozen[i + 1 :]], x, room)
    for start, end in pairwise(ends):
        A, B, s, _ = _between(frozen[i], start, end)
        total.addmm_(B.to(total), A.to(total), alpha=s)
    return total


def _places(what: list[Any]) -> list[Any]:
    """What a sum is made of, however its values and its number of columns have changed."""
    return [(part[0], *part[3:]) if isinstance(part, tuple) else part for part in what]


def _columns(adapter: Adapter) -> tuple[int, ...]:
    """How many it had at first, and after each addition."""
    growth = adapter.growth
    return growth.columns if growth and growth.columns[-1:] == adapter.lora_A.shape[:1] else ()


def _between(adapter: Adapter, start: int, end: int) -> Adapter:
    return Adapter(adapter.lora_A[start:end], adapter.lora_B[:, start:end], adapter.scale)


def _before(what: list[Any], frozen: Sequence[Adapter], i: int) -> list[Any] | None:
    """What a sum was made of before the last columns of adapter i came; None where more has been written since."""
    growth = frozen[i].growth
    assert growth is not None
    if (frozen[i].lora_A._version, frozen[i].lora_B._version) != growth.after:
        return None
    old, at = _between(frozen[i], 0, growth.columns[-2]), 2 + len(frozen) + 2 * i  # behind a dtype, scales and W
    return [*what[:at], *map(_identity, old[:2], growth.before), *what[at + 2 :]]


def _identity(t: Tensor, version: int | None = None) -> tuple[Any, ...]:
    """What tells a tensor from others without reading it; with a version it had earlier."""
    return t.data_ptr(), t._version if version is None else version, t.shape, t.dtype, t.device
