"""What the engine asks of a place for moved differences: one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layers.layout import as_matrix
from ...layers.peft_lora import AdapterLayer


class Move(NamedTuple):
    """s_l·A_l diag(d_l) B_lᵀ, to be added to layer l's frozen part; layers of one shape, L of them.

    Of layers of E experts those of one layer follow one another.
    """

    layers: Sequence[AdapterLayer]
    A: Tensor  # (L·E, m, r)
    d: Tensor  # (L·E, r)
    B: Tensor  # (L·E, n, r)


def whole_update(layer: AdapterLayer, sign: float = 1.0) -> Move:
    """sign·s·A Bᵀ of one layer as it is now."""
    A, Bt = as_matrix(layer.A), as_matrix(layer.Bt)
    return Move([layer], A[None], A.new_full((1, layer.rank), sign), Bt.mT[None])


def whole_updates(layers: Sequence[AdapterLayer], A: Tensor, B: Tensor) -> Move:
    """s·A Bᵀ of layers of one shape: A (L, m, r) and B (L, n, r)."""
    return Move(layers, A, A.new_ones((len(layers), A.shape[-1]), dtype=torch.float64), B)


class Store(ABC):
    """Takes s·A diag(1 − α∘β) Bᵀ of each layer, so that the model's function does not change when A, B are rescaled."""

    @abstractmethod
    def receive(self, moves: Sequence[Move], *, valid: Tensor | None = None, spare: int = 0) -> None:
        """Add one move of r columns to every layer that has one.

        Args:
            moves: no layer in two of them.
            valid: 0-d; where it is false nothing changes, whatever A and B hold: 0·NaN is NaN.
            spare: so many calls more must fit afterwards before anything is compressed.
        """

    def exchange(self, old: Sequence[Move], new: Sequence[Move]) -> None:
        """Take over adapters' whole products and give up those of the adapters that take their place.

        Args:
            old: what the adapters were, to be added; no layer in two of them.
            new: what they become, to be subtracted: the same layers in the same order, and as many columns.
        """
        # Compressed, where it must be, while it holds the update so far and no adapter's beginning.
        self.receive(old, spare=2)
        self.receive([move._replace(d=-move.d) for move in new])

    def discarded_share(self, like: Tensor) -> Tensor:
        """Norm of all that was discarded so far, relative to what was kept at that time; mean over layers, 0-d."""
        return torch.zeros_like(like)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs and the model's own state does not hold."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""


def only_where(valid: Tensor | None, tensor: Tensor) -> Tensor:
    """Zeros where ``valid`` is false, without waiting for the device."""
    return tensor if valid is None else torch.where(valid, tensor, 0.0)
