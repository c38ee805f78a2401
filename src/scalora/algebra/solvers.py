"""Many tiny non-negative least-squares problems at once, by block principal pivoting.

Source: Kim and Park, "Fast nonnegative matrix factorization: an active-set-like method and comparisons",
SIAM J. Sci. Comput. 33 (2011), with the backup rule of Júdice and Pires (1994) that makes it finite.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..common.shapes import Bool, Float

_PATIENCE = 3  # full exchanges allowed without progress before the backup rule takes over


class NonNegativeSolution(NamedTuple):
    """Minimiser ``x`` (…, k) and, per problem, whether the optimality conditions were reached."""

    x: Float[Tensor, "*batch k"]
    converged: Bool[Tensor, "*batch"]


def solve_nonnegative(
    S: Float[Tensor, "*batch k k"], h: Float[Tensor, "*batch k"], *, max_iterations: int = 64
) -> NonNegativeSolution:
    """Minimise ½ xᵀSx − hᵀx subject to x ≥ 0, for a batch of symmetric positive definite S.

    Args:
        S: (…, k, k), float64, positive definite, best scaled to a unit diagonal.
        h: (…, k), float64.
        max_iterations: exchanges of the passive set; a handful is enough in practice. On a GPU all of them are
            run, since leaving early would stall it.

    Returns:
        The minimisers and a flag per problem; an unconverged x is non-negative, but not optimal.
    """
    k = h.shape[-1]
    index = torch.arange(k, device=h.device)
    tolerance = 1e-12 * h.abs().amax(-1, keepdim=True)
    passive = torch.ones_like(h, dtype=torch.bool)
    fewest = torch.full(h.shape[:-1], k + 1, device=h.device)
    patience = torch.full_like(fewest, _PATIENCE)

    for _ in range(max_iterations):
        x, gradient = _restricted(S, h, passive)
        wrong = torch.where(passive, x < 0, gradient < -tolerance)
        count = wrong.sum(-1)
        if h.device.type == "cpu" and not bool(count.any()):
            break
        progress = count < fewest
        fewest = torch.where(progress, count, fewest)
        block = progress | (patience > 0)
        patience = torch.where(progress, _PATIENCE, (patience - 1).clamp(min=0))
        last_wrong = torch.where(wrong, index, -1).amax(-1, keepdim=True)
        exchanged = torch.where(block[..., None], wrong, index == last_wrong)
        passive = passive ^ (exchanged & (count > 0)[..., None])

    x, gradient = _restricted(S, h, passive)
    right = torch.where(passive, x >= 0, gradient >= -tolerance)
    return NonNegativeSolution(x.clamp(min=0), right.all(-1))


def _restricted(
    S: Float[Tensor, "*batch k k"], h: Float[Tensor, "*batch k"], passive: Bool[Tensor, "*batch k"]
) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch k"]]:
    """Solution of the problem with all but the passive entries held at zero, and the gradient there."""
    free = passive.to(S.dtype)
    # The identity on the fixed entries keeps every problem the same size, so that one batched call solves them all.
    restricted = S * free[..., :, None] * free[..., None, :] + torch.diag_embed(1 - free)
    result = torch.linalg.cholesky_ex(restricted)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    factor, _ = cast("tuple[Tensor, Tensor]", result)
    x = torch.cholesky_solve((h * free)[..., None], factor)[..., 0] * free
    return x, ((S @ x[..., None])[..., 0] - h) * (1 - free)
