"""What happened at each event, gathered on the device and read on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..algebra.scaling import SolutionKind
from ..layers.peft_lora import AdapterLayer

_COLUMNS = len(SolutionKind) + 8  # shares per kind, three quantiles of α, three of β, moved, discarded


@dataclass(frozen=True)
class Event:
    """One rescaling of all layers."""

    step: int  # optimizer steps taken before it
    shares: dict[str, float]  # kind of solution → share of layers
    alpha: tuple[float, float, float]  # least, median and greatest factor of A over all layers
    beta: tuple[float, float, float]  # and of B
    moved: float  # mean over layers of ‖A diag(1 − α∘β) Bᵀ‖ / ‖A Bᵀ‖
    discarded: float  # mean over layers of the norm that recompressions lost so far, relative to the accumulated update


@dataclass
class Collector:
    """Gathers one event, group by group, without waiting for the device."""

    index: list[int] = field(default_factory=list)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def collect(self, index: list[int], alpha: Tensor, beta: Tensor, kind: Tensor, moved: Tensor) -> None:
        """Add a group: α, β (L, r), kind (L), moved (L)."""
        self.index += index
        self.parts.append((alpha, beta, kind, moved))

    def summary(self, discarded: Tensor) -> Tensor:
        """One row of the history, float64."""
        device = self.parts[0][0].device
        alpha, beta, kind, moved = (torch.cat([part[i].flatten().to(device) for part in self.parts]) for i in range(4))
        shares = (kind[:, None] == torch.arange(len(SolutionKind), device=device)).double().mean(0)
        spreads = [torch.stack([f.min(), f.median(), f.max()]) for f in (alpha, beta)]
        return torch.cat([shares, *spreads, moved.mean()[None], discarded[None].to(shares)])


class History:
    """One row per event, and the factors of the last one in full."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: list[Tensor] = []
        self.last: Collector | None = None

    def append(self, step: int, event: Collector, discarded: Tensor) -> None:
        self._steps.append(step)
        self._rows.append(event.summary(discarded))
        self.last = event

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """(α, β) of the last event per layer, each (r,), in the order of the layers; of experts for each."""
        if self.last is None:
            return []
        pairs = [pair for part in self.last.parts for pair in zip(part[0], part[1], strict=True)]
        return [pair for _, pair in sorted(zip(self.last.index, pairs, strict=True), key=lambda item: item[0])]

    def events(self) -> list[Event]:
        if not self._rows:
            return []
        rows = torch.stack(self._rows).tolist()
        return [_event(step, row) for step, row in zip(self._steps, rows, strict=True)]

    def latest(self) -> Event | None:
        return _event(self._steps[-1], self._rows[-1].tolist()) if self._rows else None

    def state(self) -> dict[str, Any]:
        rows = torch.stack(self._rows).cpu() if self._rows else torch.zeros(0, _COLUMNS, dtype=torch.float64)
        return {"steps": list(self._steps), "rows": rows}

    def load(self, state: dict[str, Any]) -> None:
        self._steps, self._rows = list(state["steps"]), list(state["rows"])


def _event(step: int, row: list[float]) -> Event:
    n = len(SolutionKind)
    shares = {kind.name.lower(): row[kind] for kind in SolutionKind if row[kind] > 0}
    return Event(step, shares, tuple(row[n : n + 3]), tuple(row[n + 3 : n + 6]), row[-2], row[-1])  # pyright: ignore


def by_layer(
    layers: Sequence[AdapterLayer], pairs: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of tensors, one for each member of all groups, by layer; those of experts stacked. Empty without pairs."""
    left, found = iter(pairs), {}
    for layer in layers if pairs else ():
        first, second = zip(*islice(left, layer.experts), strict=True)
        found[layer.name] = (torch.stack(first), torch.stack(second)) if layer.experts > 1 else (first[0], second[0])
    return found
