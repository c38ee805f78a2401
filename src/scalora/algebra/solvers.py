"""Many tiny least-squares problems at once, and what rounding asks for: balancing, a ridge, proximal steps.

A problem is min ½ vᵀSv − hᵀv with S symmetric and positive semi-definite, possibly singular, and known up to rounding.
It is solved in y = √diag(S)·v, whose matrix has a unit diagonal, with a ridge as large as rounding can take from its
eigenvalues; a few proximal steps take the ridge's bias away again and keep its stability.

Non-negative problems: block principal pivoting, Kim and Park, "Fast nonnegative matrix factorization: an
active-set-like method and comparisons", SIAM J. Sci. Comput. 33 (2011), with the backup rule of Júdice and Pires (1994)
that makes it finite.
"""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..common.shapes import Bool, Float

_PROXIMAL_STEPS = 3
_PATIENCE = 3  # full exchanges allowed without progress before the backup rule takes over


class Balanced(NamedTuple):
    """S and h in y = root·v, and S with its ridge; rows and columns of inactive unknowns are the identity's."""

    S: Float[Tensor, "*batch k k"]
    h: Float[Tensor, "*batch k"]
    root: Float[Tensor, "*batch k"]
    ridged: Float[Tensor, "*batch k k"]
    ridge: float


def balance(
    S: Float[Tensor, "*batch k k"], h: Float[Tensor, "*batch k"], active: Bool[Tensor, "*batch k"], epsilon: float
) -> Balanced:
    """Scale S to a unit diagonal and add what rounding to ``epsilon`` can take from its eigenvalues."""
    root = torch.where(active, S.diagonal(dim1=-2, dim2=-1), 1.0).sqrt()
    keep = active.to(S.dtype)
    S = S / root[..., :, None] / root[..., None, :] * keep[..., :, None] * keep[..., None, :]
    S = S + torch.diag_embed(1 - keep)
    ridge = 8 * S.shape[-1] * epsilon
    ridged = S + ridge * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return Balanced(S, h / root * keep, root, ridged, ridge)


def solve_semidefinite(
    S: Float[Tensor, "*batch k k"], h: Float[Tensor, "*batch k"], active: Bool[Tensor, "*batch k"], epsilon: float
) -> tuple[Float[Tensor, "*batch k"], Bool[Tensor, "*batch"]]:
    """The solution of S v = h of least norm (in the balanced unknowns), and whether it could be found.

    Args:
        S: (…, k, k), float64, symmetric positive semi-definite.
        h: (…, k), float64.
        active: (…, k); the other unknowns are 0.
        epsilon: unit roundoff of the arithmetic that formed S and h.
    """
    S, h, root, ridged, _ = balance(S, h, active, epsilon)
    factor, failed = _cholesky(ridged)
    y = torch.zeros_like(h)
    for _ in range(1 + _PROXIMAL_STEPS):  # iterated Tikhonov: tends to the pseudo-inverse's solution
        y = y + torch.cholesky_solve((h - (S @ y[..., None])[..., 0])[..., None], factor)[..., 0]
    return y / root, failed == 0


def solve_bounded(
    S: Float[Tensor, "*batch k k"],
    h: Float[Tensor, "*batch k"],
    low: Float[Tensor, "*batch k"],
    active: Bool[Tensor, "*batch k"],
    epsilon: float,
) -> tuple[Float[Tensor, "*batch k"], Bool[Tensor, "*batch"]]:
    """The minimiser over v ≥ low, and whether it was reached; arguments as :func:`solve_semidefinite`."""
    S, h, root, ridged, ridge = balance(S, h, active, epsilon)
    low = torch.where(active, low * root, 0.0)
    y = low
    converged = torch.ones_like(h[..., 0], dtype=torch.bool)
    for _ in range(1 + _PROXIMAL_STEPS):
        u, converged = solve_nonnegative(ridged, h - (S @ low[..., None])[..., 0] + ridge * (y - low))
        y = low + u
    return y / root, converged


def solve_two_nonnegative(
    S: tuple[Float[Tensor, "*batch"], ...], h: tuple[Float[Tensor, "*batch"], ...], epsilon: float
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Two unknowns, neither negative, in closed form.

    Args:
        S: the three entries p_1, x, p_2 of [[p_1, x], [x, p_2]], (…) each; a p of 0 leaves its unknown at 0.
        h: h_1 and h_2, (…), none negative.
        epsilon: unit roundoff of the arithmetic that formed them.
    """
    p_1, x, p_2 = S
    root_1, root_2 = p_1.sqrt(), p_2.sqrt()
    safe_1, safe_2 = (torch.where(root > 0, root, 1.0) for root in (root_1, root_2))
    rho, h_1, h_2 = x / (safe_1 * safe_2), h[0] / safe_1, h[1] / safe_2
    one = 1 + 2 * 8 * epsilon  # a line of optima (rho = 1) gives its point nearest to zero
    determinant = one**2 - rho**2
    y_1, y_2 = (one * h_1 - rho * h_2) / determinant, (one * h_2 - rho * h_1) / determinant
    only_1, only_2 = y_2 <= 0, y_1 <= 0
    y_1 = torch.where(only_1, h_1, y_1.clamp(min=0))
    y_2 = torch.where(only_2, h_2, y_2.clamp(min=0))
    return y_1 / safe_1, y_2 / safe_2


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
    factor, _ = _cholesky(restricted)
    x = torch.cholesky_solve((h * free)[..., None], factor)[..., 0] * free
    return x, ((S @ x[..., None])[..., 0] - h) * (1 - free)


def _cholesky(S: Float[Tensor, "*batch k k"]) -> tuple[Tensor, Tensor]:
    """The factors, and a number per matrix that is 0 where there is one."""
    result = torch.linalg.cholesky_ex(S)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast("tuple[Tensor, Tensor]", result)
