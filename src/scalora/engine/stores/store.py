"""What the engine asks of a place for moved differences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...layers.peft_lora import AdapterLayer


class Store(ABC):
    """Takes s·A diag(1 − α∘β) Bᵀ of each layer, so that the model's function does not change when A, B are rescaled."""

    def lacks(self, slots: int) -> bool:
        """Whether :meth:`make_room` must come before additions of `slots` times r columns."""
        return False

    @property
    def full(self) -> bool:
        """Whether there is no room for an addition of r columns."""
        return self.lacks(1)

    def make_room(self) -> None:
        """Called when room is lacking, before an event that is sure to take place."""

    def end_event(self) -> None:
        """Called after one addition of r columns per layer."""

    def declare(self) -> None:
        """Tell the layers how much of the store is in use: called whenever its matrices were written to."""

    def discarded_share(self, like: Tensor) -> Tensor:
        """Norm of all that was discarded so far, relative to what was kept at that time; mean over layers, 0-d."""
        return torch.zeros_like(like)

    @abstractmethod
    def add(self, layers: Sequence[AdapterLayer], A: Tensor, d: Tensor, B: Tensor) -> None:
        """Add A_l diag(d_l) B_lᵀ to layer l; of one shape. A: (L, m, r), d: (L, r), B: (L, n, r)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs and the model's own state does not hold."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
