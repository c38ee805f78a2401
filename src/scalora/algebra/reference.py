"""The obviously right twin of :mod:`scalora.algebra.scaling`: dense, float64, one layer at a time.

Recovers nothing, forms everything: takes the full gradient G (m×n), builds the 2r matrices A_i g_B,iᵀ and g_A,i B_iᵀ of
Theorem 5 and solves the least-squares problem on their m·n entries with standard solvers. For tests and ablations:
it needs scipy, which the core does not install (`scalora[arena]` does).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from ..common.shapes import Float
from .scaling import ScalingMethod, SolutionKind


class ReferenceScaling(NamedTuple):
    """α, β (r), float64, and the kind of solution."""

    alpha: Float[Tensor, "r"]
    beta: Float[Tensor, "r"]
    kind: SolutionKind


def objective(
    G: Float[Tensor, "m n"],
    A: Float[Tensor, "m r"],
    B: Float[Tensor, "n r"],
    alpha: Float[Tensor, "r"],
    beta: Float[Tensor, "r"],
    c: float,
) -> float:
    """‖c·G − G B̃B̃ᵀ − ÃÃᵀG‖²_F with Ã = A diag(α), B̃ = B diag(β), in float64 (equation 7)."""
    G, A, B, alpha, beta = (t.double() for t in (G, A, B, alpha, beta))
    A, B = A * alpha, B * beta
    return float((c * G - G @ B @ B.T - A @ A.T @ G).square().sum())


def reference_scaling(
    G: Float[Tensor, "m n"],
    A: Float[Tensor, "m r"],
    B: Float[Tensor, "n r"],
    *,
    c: float,
    method: ScalingMethod = "paper",
    floor: float = 1e-2,
) -> ReferenceScaling:
    """The factors of :func:`scalora.algebra.scaling.optimal_scaling` from the full gradient G = ∂ℓ/∂W.

    Source: arXiv 2510.23818, Theorems 3 and 5; the constrained optimum by scipy's bounded least squares.
    """
    G, A, B = G.double(), A.double(), B.double()
    g_A, g_B = G @ B, G.T @ A
    r = A.shape[1]
    norms = torch.cat([A.square().sum(0), B.square().sum(0)])
    columns = [torch.outer(A[:, i], g_B[:, i]) for i in range(r)] + [torch.outer(g_A[:, i], B[:, i]) for i in range(r)]
    M = torch.stack([column.flatten() for column in columns], 1).numpy()
    influence = np.linalg.norm(M, axis=0) > 0
    bound = np.where(norms.numpy() > 0, floor**2 * c / np.maximum(norms.numpy(), 1e-300), 0.0)

    if method == "normalize":
        if not influence.any():
            return ReferenceScaling(torch.ones(r).double(), torch.ones(r).double(), SolutionKind.NONE)
        v = np.where(norms.numpy() > 0, c / np.maximum(norms.numpy(), 1e-300), 1.0)
        return _pack(v, r, SolutionKind.NORMALIZE)
    if not influence.any():
        return _pack(np.ones(2 * r), r, SolutionKind.NONE)

    target = (c * G).flatten().numpy()
    v, kind = np.ones(2 * r), SolutionKind.SCALAR
    used, size = M[:, influence], np.linalg.norm(M[:, influence], axis=0)
    if method == "nonnegative":
        # |target| is scaled to one and the columns too, so that the solver's tolerances mean the same everywhere.
        scale = np.linalg.norm(target)
        low = bound[influence] * size / scale
        solution = lsq_linear(used / size, target / scale, bounds=(low, np.inf), method="bvls", tol=1e-15)
        v[influence], kind = solution.x * scale / size, SolutionKind.NONNEGATIVE
    else:
        y = np.linalg.lstsq(used / size, target, rcond=1e-9)[0]
        if method == "paper" and (y > 0).all():
            v[influence], kind = y / size, SolutionKind.COLUMN
        else:
            v[influence] = _scalar(M, target, r)[influence]
    v[influence] = np.maximum(v, bound)[influence]
    return _pack(v, r, kind)


def reference_adapters(G: Float[Tensor, "m n"], r: int, c: float) -> tuple[Float[Tensor, "m r"], Float[Tensor, "n r"]]:
    """Ã, B̃ of :func:`scalora.algebra.directions.optimal_adapters`, from a dense SVD of G (Theorem 1)."""
    U, _, Vt = np.linalg.svd(G.double().numpy())
    return torch.from_numpy(np.sqrt(c) * U[:, 0 : 2 * r : 2]), torch.from_numpy(np.sqrt(c) * Vt[1 : 2 * r : 2].T)


@torch.no_grad()
def rescale_layer(
    W: Float[Tensor, "m n"], A: nn.Parameter, Bt: nn.Parameter, optimizer: torch.optim.Optimizer, s: float, c: float
) -> tuple[Float[Tensor, "r"], Float[Tensor, "r"]]:
    """One layer's event as Algorithm 1 of arXiv 2510.23818 reads, the base weight W written to; returns α, β (r).

    What :mod:`scalora.engine.event` does for all layers at once; for those with a gradient and no zero columns.
    ``c`` is 1/(Lη)/s², since PEFT's gradients carry s; the optimizer is an Adam.
    """
    assert A.grad is not None
    assert Bt.grad is not None
    a, b, g_A, g_B = A.double(), Bt.double().T, A.grad.double(), Bt.grad.double().T
    AA, BB, GA, GB, X = a.T @ a, b.T @ b, g_A.T @ g_A, g_B.T @ g_B, (a.T @ g_A) ** 2
    S = torch.cat([torch.cat([AA * GB, X], 1), torch.cat([X.T, GA * BB], 1)])
    v = torch.linalg.solve(S, torch.cat([GB.diagonal(), GA.diagonal()]))  # Theorem 5
    if (v <= 0).any():  # Theorem 3
        p_A, p_B, x, n_A, n_B = (AA * GB).sum(), (GA * BB).sum(), X.sum(), GA.trace(), GB.trace()
        y_A, y_B = p_B * n_B - x * n_A, p_A * n_A - x * n_B
        if y_A <= 0:
            y_A, y_B = torch.zeros(()).double(), n_A / p_B
        elif y_B <= 0:
            y_A, y_B = n_B / p_A, torch.zeros(()).double()
        else:
            y_A, y_B = y_A / (p_A * p_B - x**2), y_B / (p_A * p_B - x**2)
        v = torch.cat([y_A.expand(len(X)), y_B.expand(len(X))])
    floor = 1e-4 / torch.cat([AA.diagonal(), BB.diagonal()])  # no column's norm falls under 1e-2·√c
    alpha, beta = (c * torch.maximum(v, floor)).sqrt().to(A.dtype).chunk(2)
    W.add_(s * (A * (1 - alpha * beta)) @ Bt)
    A.mul_(alpha)
    Bt.mul_(beta[:, None])
    for parameter, gradient, factor in ((A, A.grad, beta), (Bt, Bt.grad, alpha[:, None])):
        state = optimizer.state[parameter]
        gradient.mul_(factor)
        state["exp_avg"].mul_(factor)
        state["exp_avg_sq"].mul_(factor**2)
    return alpha, beta


def _scalar(M: np.ndarray, target: np.ndarray, r: int) -> np.ndarray:
    """Theorem 3: the non-negative solution with one unknown for A and one for B, by its three cases."""
    pair = np.stack([M[:, :r].sum(1), M[:, r:].sum(1)], 1)
    size = np.linalg.norm(pair, axis=0)
    used = size > 0
    value = np.ones(2)
    y = np.linalg.lstsq(pair[:, used] / size[used], target, rcond=1e-9)[0]
    if len(y) == 2 and (y <= 0).any():
        alone = pair.T @ target / size
        y = np.where(y <= 0, 0.0, alone)
    value[used] = y / size[used]
    return np.repeat(value, r)


def _pack(v: np.ndarray, r: int, kind: SolutionKind) -> ReferenceScaling:
    factors = torch.from_numpy(np.sqrt(v))
    return ReferenceScaling(factors[:r], factors[r:], kind)
