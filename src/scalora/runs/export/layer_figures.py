"""Figures of a low-rank update, layer by layer: ranks, and the norms of its trained and its accumulated part."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...algebra.lowrank import effective_rank, numerical_rank, singular_values
from .artefact import LayerFactors


@dataclass(frozen=True)
class LayerFigures:
    """One layer's update P Qᵀ = trained + accumulated; norms are Frobenius norms."""

    name: str
    shape: tuple[int, int]  # m, n
    columns: int  # of P and Q: r and the accumulated columns in use
    rank: int  # numerical rank
    effective_rank: float
    norm: float
    trained: float
    accumulated: float
    accumulated_share: float  # of the sum of both squared norms

    @property
    def kind(self) -> str:
        """The last part of the layer's name."""
        return self.name.rsplit(".", 1)[-1]


def layer_figures(name: str, trained: LayerFactors, accumulated: LayerFactors | None) -> LayerFigures:
    """Figures of one layer, in float64 and without forming an m×n matrix."""
    parts = [part for part in (trained, accumulated) if part is not None]
    P, Q = (torch.cat([side.double() for side in sides], -1) for sides in zip(*parts, strict=True))
    m, n = P.shape[0], Q.shape[0]
    sigma = singular_values(P, Q)
    energies = [product_energy(part.P.double(), part.Q.double()) for part in parts]
    both = sum(energies)
    return LayerFigures(
        name, (m, n), P.shape[1], int(numerical_rank(sigma, m, n)), float(effective_rank(sigma)),
        float(sigma.square().sum().sqrt()), energies[0] ** 0.5, sum(energies[1:]) ** 0.5,
        sum(energies[1:]) / both if both > 0 else 0.0,
    )  # fmt: skip


def product_energy(P: Tensor, Q: Tensor) -> float:
    """‖P Qᵀ‖²_F = tr[(PᵀP)(QᵀQ)]."""
    return max(0.0, float(((P.mT @ P) * (Q.mT @ Q)).sum()))


def by_kind(layers: list[LayerFigures]) -> dict[str, dict[str, Any]]:
    """Medians over the layers of one kind, with their number and, where all agree, their shape."""
    groups: dict[str, list[LayerFigures]] = defaultdict(list)
    for layer in layers:
        groups[layer.kind].append(layer)
    figures = ("columns", "rank", "effective_rank", "norm", "trained", "accumulated", "accumulated_share")
    return {
        kind: {
            "layers": len(group),
            "shape": group[0].shape if len({layer.shape for layer in group}) == 1 else None,
            **{figure: median(asdict(layer)[figure] for layer in group) for figure in figures},
        }
        for kind, group in groups.items()
    }
