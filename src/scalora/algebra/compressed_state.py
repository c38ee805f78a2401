"""Steps of full rank from an optimizer state of a LoRA's size: what APOLLO, Fira and Flora have in common.

A gradient G (m×n) is seen through P (r×m) where m < n, as PG (r×n), else as GPᵀ (m×r) with P (r×n): the smaller side
is compressed. Sources: arXiv 2412.05270 (APOLLO), 2410.01623 (Fira), 2402.03293 (Flora), 1804.04235 (Adafactor).
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from ..common.shapes import Float


def random_rows(rank: int, size: int, like: Tensor, *seed: object) -> Float[Tensor, "r k"]:
    """P (rank, size) of independent N(0, 1/rank), the same for the same seed, dtype and device of ``like``."""
    number = random.Random(" ".join(map(str, seed))).getrandbits(63)
    generator = torch.Generator(like.device).manual_seed(number)
    return torch.randn(rank, size, generator=generator, dtype=like.dtype, device=like.device) / math.sqrt(rank)


def compress(G: Float[Tensor, "m n"], P: Float[Tensor, "r k"]) -> Tensor:
    """PG (r, n) where m < n, else GPᵀ (m, r)."""
    return P @ G if G.shape[0] < G.shape[1] else G @ P.mT


def expand(R: Tensor, P: Float[Tensor, "r k"], shape: torch.Size) -> Float[Tensor, "m n"]:
    """Pᵀ R or R P: the transposed map, back to ``shape`` (m, n)."""
    return P.mT @ R if shape[0] < shape[1] else R @ P


def leading_rows(G: Float[Tensor, "m n"], rank: int) -> Float[Tensor, "r k"]:
    """The top ``rank`` singular vectors of G on its smaller side, as orthonormal rows."""
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    return (U[:, :rank].mT if G.shape[0] < G.shape[1] else Vt[:rank]).contiguous()


def growth_limited(U: Tensor, former: Tensor | None, limit: float = 1.01) -> tuple[Tensor, Tensor]:
    """U shortened to ``limit`` times the norm of the former one, and its norm (0-dim): Fira's norm-growth limiter.

    After a step of norm zero, as of a gradient of zeros, nothing is shortened: no later step could leave zero again.
    """
    norm = U.norm()
    if former is None:
        return U, norm
    factor = torch.clamp(limit * former / norm.clamp(min=torch.finfo(norm.dtype).tiny), max=1)
    factor = torch.where(former > 0, factor, 1.0)
    return U * factor, norm * factor


def factored_scaled(G: Float[Tensor, "m n"], row: Float[Tensor, " m"], column: Float[Tensor, " n"]) -> Tensor:
    """G/√V for V = row columnᵀ / mean(row): Adafactor's estimate of the second moments from their means."""
    return G * (row / row.mean()).rsqrt()[:, None] * column.rsqrt()
