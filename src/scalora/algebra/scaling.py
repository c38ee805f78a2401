"""Theorems 3 and 5 of ScaLoRA: the optimal scaling of LoRA's columns, in closed form, for many layers at once.

ScaLoRA (arXiv 2510.23818) chooses Ã = A diag(α), B̃ = B diag(β) so that one gradient step on (Ã, B̃) comes closest
to the best full step, i.e. minimises ‖c·G − G B̃B̃ᵀ − ÃÃᵀG‖_F (equation 7). That is a quadratic in v = [α²; β²].

Everything is batched over leading dimensions (layers), free of host synchronisation on accelerators, and pure.
The dense float64 twin stands in :mod:`scalora.algebra.reference`; rounding is the business of :mod:`.solvers`.
"""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Bool, Float, Int
from .gram import TINY, Gram, column_norms, gram_products, influence, normal_equations, scalar_sums
from .solvers import solve_bounded, solve_semidefinite, solve_two_nonnegative

ScalingMethod = Literal["paper", "nonnegative", "scalar", "normalize"]


class SolutionKind(IntEnum):
    """How a layer's factors were found."""

    NONE = 0  # no usable gradient: the factors are 1
    COLUMN = 1  # Theorem 5, all factors positive
    SCALAR = 2  # Theorem 3
    NONNEGATIVE = 3  # the constrained optimum
    NORMALIZE = 4  # every column to norm √c


class Scaling(NamedTuple):
    """Column factors α, β (…, r), float64, all positive and finite, and :class:`SolutionKind` per layer (…), int8."""

    alpha: Float[Tensor, "*batch r"]
    beta: Float[Tensor, "*batch r"]
    kind: Int[Tensor, "*batch"]


def theorem_3(gram: Gram) -> Float[Tensor, "*batch k"]:
    """v = [α²; β²] with one factor for A and one for B, for c = 1: the optimum over both, neither negative."""
    p_A, p_B, n_A, n_B, x = scalar_sums(gram)
    alpha2, beta2 = solve_two_nonnegative((p_A, x, p_B), (n_B, n_A), gram.epsilon)
    return torch.stack([alpha2, beta2], -1).repeat_interleave(gram.AA.shape[-1], -1)


def theorem_5(gram: Gram) -> tuple[Float[Tensor, "*batch k"], Bool[Tensor, "*batch"]]:
    """v = [α²; β²] with S v = λ, for c = 1, and whether it is the optimum: solved, and no factor negative."""
    active = influence(gram)
    S, rhs = normal_equations(gram)
    v, solved = solve_semidefinite(S, rhs, active, gram.epsilon)
    return v, solved & ((v > 0) | ~active).all(-1)


def constrained_optimum(
    gram: Gram, bound: Float[Tensor, "*batch k"]
) -> tuple[Float[Tensor, "*batch k"], Bool[Tensor, "*batch"]]:
    """The optimum over v ≥ bound, for c = 1, which Theorem 5 is where that is positive; and whether it was reached."""
    S, rhs = normal_equations(gram)
    return solve_bounded(S, rhs, bound, influence(gram), gram.epsilon)


def calibrate(gram: Gram) -> Float[Tensor, "*batch"]:
    """The constant c (…) for which the factor that carries the adapter's scale keeps it; NaN without a gradient.

    At t = 0, where one factor is zero, this is c = p_A/n_B (or its mirror image), i.e. a scalar factor of 1: no
    constant to tune. With PEFT's gradients, which carry the LoRA scale s, the result is c/s². Derived.
    """
    p_A, p_B, n_A, n_B, _ = scalar_sums(gram)
    return torch.fmax(p_A / n_B, p_B / n_A)  # 0/0 is NaN, which fmax ignores


def solve_scaling(
    gram: Gram, *, c: Float[Tensor, "*batch"], method: ScalingMethod = "paper", floor: float = 1e-2
) -> Scaling:
    """Factors from Gram products; see :func:`optimal_scaling`."""
    norms = column_norms(gram)
    bound = torch.where(norms > TINY, floor**2 / norms, 0.0)  # of v, for c = 1: v is linear in c
    neutral = 1 / c[..., None]  # a factor of 1
    active = influence(gram)

    if method == "normalize":
        found, kinds = torch.where(norms > TINY, 1 / norms, neutral), SolutionKind.NORMALIZE
    else:
        found, kinds = theorem_3(gram), SolutionKind.SCALAR
        if method != "scalar":
            v, optimal = theorem_5(gram) if method == "paper" else constrained_optimum(gram, bound)
            better = SolutionKind.COLUMN if method == "paper" else SolutionKind.NONNEGATIVE
            found, kinds = torch.where(optimal[..., None], v, found), torch.where(optimal, better, kinds)
        # A factor without influence on the objective stays at 1.
        found, bound = torch.where(active, found, neutral), torch.where(active, bound, 0.0)
    v = torch.maximum(found, bound) * c[..., None]

    usable = active.any(-1) & torch.isfinite(c) & (c > 0) & torch.isfinite(v).all(-1)
    alpha, beta = torch.where(usable[..., None], v, 1.0).sqrt().chunk(2, -1)
    return Scaling(alpha, beta, torch.where(usable, kinds, SolutionKind.NONE).to(torch.int8))


def optimal_scaling(
    A: Float[Tensor, "*batch m r"],
    B: Float[Tensor, "*batch n r"],
    grad_A: Float[Tensor, "*batch m r"],
    grad_B: Float[Tensor, "*batch n r"],
    *,
    c: float | Float[Tensor, "*batch"],
    method: ScalingMethod = "paper",
    floor: float = 1e-2,
) -> Scaling:
    """Column factors (α, β) that make A diag(α), B diag(β) the best adapters for the present gradient.

    Args:
        A: adapter of W = W_pt + A Bᵀ, (…, m, r); leading dimensions are layers.
        B: its partner, (…, n, r).
        grad_A: ∂ℓ/∂A = G B, shaped as A.
        grad_B: ∂ℓ/∂B = GᵀA, shaped as B. The solution does not change when both gradients are multiplied by one
            number, so clipping and loss scaling leave it alone.
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
