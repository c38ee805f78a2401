"""The sum of a layer's weight and its frozen columns, formed once for all training passes until one of them changes.

W + Σ s·P Qᵀ is the same from one event to the next. A layer that keeps it pays for its frozen columns once an event
instead of in each pass, and a step costs LoRA's, however few tokens a batch has. The weight itself is never written.
Where autocast is on, the sum has its dtype: it is what the layer would keep for backward all the same, cast once.

The sum with a weight in half precision is rounded to it, each time from the exact columns, so that nothing adds up.
It comes nearer to the exact function than the output of the rounded weight plus thin products, in which whatever is
smaller than half a step of the output's rounding is lost (benchmarks/studies/rounded_sum.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .products import Adapter, summed


class KeptSum:
    """A cache of one sum, which copies and pickles as an empty one.

    What it was formed of is known by identity, place in memory and version, so that no tensor is read for it. A weight
    that is written to through ``.data`` is noticed no earlier than at the next event, or when the model is evaluated.
    """

    def __init__(self, steps: int = 1, half: bool = False) -> None:
        """Of columns that change every so many steps; ``half``: of weights in half precision too."""
        self.steps, self.half = steps, half
        # In one assignment, since replicas share it; with what it was made of, whose place nothing else then takes.
        self._made: tuple[list[Any], Tensor, list[Tensor]] | None = None

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
        key: list[Any] = [x.dtype, *(each.scale for each in frozen)]
        key += [(t.data_ptr(), t._version, t.shape, t.dtype, t.device) for t in tensors]
        made = self._made
        if made is None or made[0] != key:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                made = self._made = key, formed(tensors[0], frozen, x), tensors
        return made[1]

    def drop(self) -> None:
        """Give its memory back."""
        self._made = None

    def __reduce__(self) -> tuple[type[KeptSum], tuple[int, bool]]:
        return KeptSum, (self.steps, self.half)


def formed(W: Tensor, frozen: Sequence[Adapter], x: Tensor) -> Tensor:
    """The sum in the dtype of `x`; with a weight in half precision it is made in float32, and rounded once."""
    if W.dtype.itemsize >= 4:
        return summed(W, frozen, x)
    exact = W.float()
    return summed(exact, frozen, exact).to(x.dtype)
