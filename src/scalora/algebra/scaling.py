"""The optimal scaling of LoRA's columns, in closed form, for many layers at once.

ScaLoRA (arXiv 2510.23818) chooses Ã = A diag(α), B̃ = B diag(β) so that one gradient step on (Ã, B̃) comes closest
to the best full step, i.e. minimises ‖c·G − G B̃B̃ᵀ − ÃÃᵀG‖_F. Nothing of size m×n is formed: the objective depends
on A (m×r), B (n×r) and their gradients g_A = G B, g_B = GᵀA through five r×r products only.

Everything is batched over leading dimensions (layers), free of host synchronisation on accelerators, and pure.
The dense float64 twin stands in :mod:`scalora.algebra.reference`.
"""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from ..common.shapes import Bool, Float, Int
from .gram import Gram, gram_products
from .solvers import solve_nonnegative

Method = Literal["paper", "nonnegative", "scalar", "normalize"]

_TINY = 1e-36  # a squared column norm below this counts as zero: float32 cannot resolve it
_PROXIMAL_STEPS = 3


class Kind(IntEnum):
    """How a layer's factors were found."""

    NONE = 0  # no usable gradient: the factors are 1
    COLUMN = 1  # Theorem 5, all factors positive
    SCALAR = 2  # Theorem 3
    NONNEGATIVE = 3  # the constrained optimum
    NORMALIZE = 4  # every column to norm √c


class Scaling(NamedTuple):
    """Column factors α, β (…, r), float64, all positive and finite, and the :class:`Kind` per layer (…), int8."""

    alpha: Float[Tensor, "*batch r"]
    beta: Float[Tensor, "*batch r"]
    kind: Int[Tensor, "*batch"]


def calibrate(gram: Gram) -> Float[Tensor, "*batch"]:
    """The constant c (…) for which the factor that carries the adapter's scale keeps it; NaN without a gradient.

    At t = 0, where one factor is zero, this is c = p_A/n_B (or its mirror image), i.e. a scalar factor of 1: no
    constant to tune. With PEFT's gradients, which carry the LoRA scale s, the result is c/s². Derived.
    """
    p_A, p_B, n_A, n_B = _scalar_sums(gram)
    return torch.fmax(p_A / n_B, p_B / n_A)  # 0/0 is NaN, which fmax ignores


def solve_scaling(gram: Gram, *, c: Float[Tensor, "*batch"], method: Method = "paper", floor: float = 1e-2) -> Scaling:
    """Factors from Gram products; see :func:`optimal_scaling`."""
    norms = torch.cat([_diagonal(gram.AA), _diagonal(gram.BB)], -1)  # squared column norms of A, then of B
    alive = norms > _TINY
    bound = torch.where(alive, floor**2 / norms, 0.0)  # of v = [α²; β²], for c = 1: v is linear in c

    if method == "normalize":
        v = torch.where(alive, 1 / norms, 1 / c[..., None])
        kind = torch.full(c.shape, Kind.NORMALIZE, dtype=torch.int8, device=c.device)
    elif method == "scalar":
        v, kind = _scalar(gram)
    else:
        v, kind = _columnwise(gram, bound, c) if method == "nonnegative" else _paper(gram)
    influence = _influence(gram)
    if method != "normalize":  # a factor without influence on the objective stays at 1
        v = torch.where(influence, v, 1 / c[..., None])
        bound = torch.where(influence, bound, 0.0)
    v = torch.maximum(v, bound) * c[..., None]

    usable = influence.any(-1) & torch.isfinite(c) & (c > 0) & torch.isfinite(v).all(-1)
    factors = torch.where(usable[..., None], v, 1.0).sqrt()
    kind = torch.where(usable, kind, Kind.NONE).to(torch.int8)
    alpha, beta = factors.chunk(2, -1)
    return Scaling(alpha, beta, kind)


def optimal_scaling(
    A: Float[Tensor, "*batch m r"],
    B: Float[Tensor, "*batch n r"],
    grad_A: Float[Tensor, "*batch m r"],
    grad_B: Float[Tensor, "*batch n r"],
    *,
    c: float | Float[Tensor, "*batch"],
    method: Method = "paper",
    floor: float = 1e-2,
) -> Scaling:
    """Column factors (α, β) that make A diag(α), B diag(β) the best adapters for the present gradient.

    Args:
        A, B: adapters of W = W_pt + A Bᵀ, (…, m, r) and (…, n, r); leading dimensions are layers.
        grad_A, grad_B: ∂ℓ/∂A = G B and ∂ℓ/∂B = GᵀA, same shapes. The solution does not change when both are
            multiplied by one number, so clipping and loss scaling leave it alone.
        c: 1/(L·η), one number or one per layer: the squared column norm that the adapters are driven to.
        method: "paper" (Theorem 5 where all its factors are positive, else Theorem 3), "nonnegative" (the constrained
            optimum, in every layer), "scalar" (Theorem 3) or "normalize" (every column to norm √c; an ablation).
        floor: no column that the method rescales ends with a norm under floor·√c.

    Returns:
        α, β (…, r) in float64 and the kind of solution per layer. Columns without influence (zero adapters or zero
        gradients, as at t = 0) keep factor 1, as do layers without any usable gradient.

    Raises:
        ValueError: shapes do not agree, or the method is unknown.

    Source: arXiv 2510.23818, Theorems 3 and 5 (numbers of v1); the constrained optimum is derived.
    """
    if A.shape != grad_A.shape or B.shape != grad_B.shape or A.shape[-1] != B.shape[-1] or A.shape[:-2] != B.shape[:-2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (A, B, grad_A, grad_B))
        raise ValueError(f"A, B, grad_A, grad_B have shapes {shapes}: expected (…, m, r), (…, n, r) and the same again")
    if method not in ("paper", "nonnegative", "scalar", "normalize"):
        raise ValueError(f"method is {method!r}: choose paper, nonnegative, scalar or normalize")
    gram = gram_products(A, B, grad_A, grad_B)
    c = torch.as_tensor(c, dtype=torch.float64, device=A.device).expand(A.shape[:-2])
    return solve_scaling(gram, c=c, method=method, floor=floor)


def _paper(gram: Gram) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch"]]:
    """Theorem 5 where every factor with influence is positive, Theorem 3 elsewhere; for c = 1."""
    S, h, root = _balanced(gram)
    result = torch.linalg.cholesky_ex(_ridged(S, gram.epsilon))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    factor, failed = cast("tuple[Tensor, Tensor]", result)
    y = torch.zeros_like(h)
    for _ in range(1 + _PROXIMAL_STEPS):  # iterated Tikhonov: tends to the pseudo-inverse's solution
        y = y + torch.cholesky_solve((h - (S @ y[..., None])[..., 0])[..., None], factor)[..., 0]
    positive = ((y > 0) | ~_influence(gram)).all(-1) & (failed == 0)
    v, kind = _scalar(gram)
    return torch.where(positive[..., None], y / root, v), torch.where(positive, Kind.COLUMN, kind)


def _columnwise(
    gram: Gram, bound: Float[Tensor, "*batch k"], c: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch"]]:
    """The optimum over v ≥ bound, in every layer; for c = 1."""
    S, h, root = _balanced(gram)
    ridged, ridge = _ridged(S, gram.epsilon), _ridge(S, gram.epsilon)
    low = torch.where(_influence(gram), bound * root, 0.0)
    y = low
    converged = torch.ones_like(c, dtype=torch.bool)
    for _ in range(1 + _PROXIMAL_STEPS):  # proximal point steps: the ridge's bias goes, its stability stays
        shifted = h - (S @ low[..., None])[..., 0] + ridge * (y - low)
        u, converged = solve_nonnegative(ridged, shifted)
        y = low + u
    v, kind = _scalar(gram)
    return torch.where(converged[..., None], y / root, v), torch.where(converged, Kind.NONNEGATIVE, kind)


def _scalar(gram: Gram) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch"]]:
    """Theorem 3 with its boundary cases, as a balanced 2×2 problem; for c = 1."""
    p_A, p_B, n_A, n_B = _scalar_sums(gram)
    x = gram.AGB.square().sum((-2, -1))
    root_A, root_B = p_A.sqrt(), p_B.sqrt()
    safe_A, safe_B = (torch.where(root > 0, root, 1.0) for root in (root_A, root_B))
    rho, h_A, h_B = x / (safe_A * safe_B), n_B / safe_A, n_A / safe_B
    one = 1 + 2 * 8 * gram.epsilon  # a line of optima (rho = 1) gives its point nearest to zero
    determinant = one**2 - rho**2
    y_A, y_B = (one * h_A - rho * h_B) / determinant, (one * h_B - rho * h_A) / determinant
    only_A, only_B = y_B <= 0, y_A <= 0
    y_A = torch.where(only_A, h_A, y_A.clamp(min=0))
    y_B = torch.where(only_B, h_B, y_B.clamp(min=0))
    v = torch.stack([y_A / safe_A, y_B / safe_B], -1).repeat_interleave(gram.AA.shape[-1], -1)
    return v, torch.full(p_A.shape, Kind.SCALAR, dtype=torch.int8, device=v.device)


def _scalar_sums(gram: Gram) -> tuple[Float[Tensor, "*batch"], ...]:
    """p_A = ‖A g_Bᵀ‖², p_B = ‖g_A Bᵀ‖², n_A = ‖g_A‖², n_B = ‖g_B‖²."""
    p_A = (gram.AA * gram.gBgB).sum((-2, -1))
    p_B = (gram.gAgA * gram.BB).sum((-2, -1))
    return p_A.clamp(min=0), p_B.clamp(min=0), _diagonal(gram.gAgA).sum(-1), _diagonal(gram.gBgB).sum(-1)


def _balanced(
    gram: Gram,
) -> tuple[Float[Tensor, "*batch k k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch k"]]:
    """S and λ of Theorem 5 in the variables y = √diag(S)·v, and √diag(S); rows without influence are the identity's."""
    cross = gram.AGB.square()
    upper = torch.cat([gram.AA * gram.gBgB, cross], -1)
    lower = torch.cat([cross.mT, gram.gAgA * gram.BB], -1)
    S = torch.cat([upper, lower], -2)
    rhs = torch.cat([_diagonal(gram.gBgB), _diagonal(gram.gAgA)], -1)
    influence = _influence(gram)
    root = torch.where(influence, _diagonal(S), 1.0).sqrt()
    keep = influence.to(S.dtype)
    S = S / root[..., :, None] / root[..., None, :] * keep[..., :, None] * keep[..., None, :]
    return S + torch.diag_embed(1 - keep), rhs / root * keep, root


def _influence(gram: Gram) -> Bool[Tensor, "*batch k"]:
    """Whether a column's factor enters the objective: its norm and its partner's gradient are finite and not zero."""
    norms = torch.cat([_diagonal(gram.AA), _diagonal(gram.BB)], -1)
    grads = torch.cat([_diagonal(gram.gBgB), _diagonal(gram.gAgA)], -1)
    return (norms > _TINY) & (grads > _TINY) & torch.isfinite(norms) & torch.isfinite(grads)


def _ridge(S: Float[Tensor, "*batch k k"], epsilon: float) -> float:
    """What rounding in the Gram products can take from the eigenvalues of a balanced S."""
    return 8 * S.shape[-1] * epsilon


def _ridged(S: Float[Tensor, "*batch k k"], epsilon: float) -> Float[Tensor, "*batch k k"]:
    return S + _ridge(S, epsilon) * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)


def _diagonal(S: Float[Tensor, "*batch k k"]) -> Float[Tensor, "*batch k"]:
    return S.diagonal(dim1=-2, dim2=-1)
