"""What was moved out of one adapter of one layer: frozen columns beside the trained ones, which PEFT never sees.

The layer's update is s·(lora_B lora_A + P Qᵀ): what is accumulated lies in units of the adapter's own scale s. Whoever
scales the adapter scales both, and both together are one plain LoRA of more columns with that scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import ScaloraError
from .products import Growth
from .sharding import copy_into, gather_full, is_sharded

ADDITIONS = 4  # times that columns are written behind others before a sum takes all at once: a recompression's rhythm


class Accumulated(nn.Module):
    """P Qᵀ of at most ``room`` columns, of which the first ``used`` are in use and all others zero.

    Args:
        m: rows of the weight.
        n: its columns.
        room: columns.
        like: a tensor of the adapter; the device is its, the dtype too, but 32 bits at least.
    """

    P: nn.Parameter  # (m, room)
    Qt: nn.Parameter  # (room, n)
    used: int
    settled = False  # whether the first columns are a recompression's: orthogonal, by falling size
    growth: Growth | None = None  # None: all columns came at once

    def __init__(self, m: int, n: int, room: int, like: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.P = nn.Parameter(torch.zeros(m, room, dtype=dtype, device=like.device), requires_grad=False)
        self.Qt = nn.Parameter(torch.zeros(room, n, dtype=dtype, device=like.device), requires_grad=False)
        self.used = 0

    @property
    def room(self) -> int:
        return self.P.shape[1]

    def live(self) -> tuple[Tensor, Tensor]:
        """P (m, k) and Qᵀ (k, n) of the columns to compute with, as they are in a forward pass."""
        # A compiled pass takes all columns: the number of those in use changes with every event.
        k = self.room if torch.compiler.is_compiling() else self.used
        return self.P[:, :k], self.Qt[:k]

    def columns(self) -> tuple[Tensor, Tensor]:
        """P (m, used) and Qᵀ (used, n); of sharded ones a gathered copy, which every process must ask for."""
        P, Qt = gather_full([self.P.detach(), self.Qt.detach()])
        return P[:, : self.used], Qt[: self.used]

    @property
    def versions(self) -> tuple[int, int]:
        """torch's, of Qᵀ and P."""
        return self.Qt._version, self.P._version

    def grown(self, k: int, before: tuple[int, int]) -> None:
        """Say that k columns were written behind those in use, and nothing else since these versions."""
        was = self.growth.columns if self.growth else (self.used,) if self.used else ()
        self.used += k
        columns = (*was, self.used) if len(was) <= ADDITIONS else (self.used,)
        self.growth = Growth(columns, before, self.versions)

    def came(self, columns: Sequence[int]) -> None:
        """Say how the columns in use have come to be, see :class:`Growth`; none: all at once."""
        self.growth = Growth(tuple(columns), self.versions, self.versions) if columns else None

    @torch.no_grad()
    def put(self, P: Tensor, Qt: Tensor) -> None:
        """Hold these columns, P (m, k) and Qᵀ (k, n), and none else.

        Raises:
            ScaloraError: there is no room for them in a sharded model.
        """
        k = P.shape[1]
        if k > self.room:
            self.widen(k)
        for mine, value in ((self.P, P), (self.Qt, Qt)):
            whole = torch.zeros(mine.shape, dtype=mine.dtype, device=mine.device)
            whole[: value.shape[0], : value.shape[1]] = value
            copy_into([mine], [whole])
        self.used, self.settled, self.growth = k, False, None

    @torch.no_grad()
    def widen(self, room: int) -> None:
        """Make room for so many columns; what is held stays."""
        if room <= self.room:
            return
        if is_sharded(self.P):
            raise ScaloraError(
                f"{room} accumulated columns do not fit into the {self.room} of a sharded layer: call "
                "scalora.prepare(model, config) with a larger capacity before fully_shard"
            )
        more = room - self.room
        self.P = nn.Parameter(nn.functional.pad(self.P, (0, more)), requires_grad=False)
        self.Qt = nn.Parameter(nn.functional.pad(self.Qt, (0, 0, 0, more)), requires_grad=False)

    def clear(self) -> None:
        """Hold nothing."""
        if self.used:
            self.put(self.P.new_zeros(self.P.shape[0], 0), self.Qt.new_zeros(0, self.Qt.shape[1]))

    def _apply(self, fn: Any, recurse: bool = True) -> Accumulated:
        """As torch's, but of 32 bits at least: rounded, what comes here is not what the adapter's columns lose."""
        exact = {name: p.detach() for name, p in self.named_parameters() if p.dtype.itemsize >= 4}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            now = getattr(self, name)
            if now.dtype.itemsize < 4:
                wide = torch.promote_types(now.dtype, torch.float32)
                setattr(self, name, nn.Parameter(value.to(now.device, wide), requires_grad=False))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing, for the layer writes these columns as the adapter's own; but for those that lie on many machines."""
        if getattr(self.P, "_fsdp_flattened", False):
            raise ScaloraError(
                "model is wrapped by FSDP1 (FullyShardedDataParallel), whose state dict takes no accumulated columns: "
                "save it before it is wrapped, or use FSDP2 (fully_shard) or DDP"
            )
        if is_sharded(self.P):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # pyright: ignore
        if f"{prefix}P" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.used, self.settled = self.room, False
