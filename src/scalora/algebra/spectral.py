"""Steepest descent of W = A Bᵀ in the spectral norm, by its two factors: half of the step from each.

With G the gradient of W, Q_A and Q_B orthonormal bases of A's and B's columns, and msign(U Σ Vᵀ) = U Vᵀ, the step is
ΔW = −η/2·(msign(G Q_B) Q_Bᵀ + Q_A msign(Q_Aᵀ G)). With R_A = (AᵀA)^−½, R_B = (BᵀB)^−½, g_A = G B and g_B = GᵀA it is,
to first order, that of ΔA = −η/2·msign(g_A R_B) R_B and ΔB = −η/2·msign(g_B R_A) R_A: no bases are needed.

Source: arXiv 2606.12921 (LoRA-Muon), Algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float

RELATIVE_DAMPING = 1e-5  # appendix B.4: of a Gram matrix of norm 1
_NOISE = 1e-12  # below this share of XᵀX's norm a direction of X is float32's rounding


class SpectralDirections(NamedTuple):
    """msign(M_A R_B) R_B and msign(M_B R_A) R_A: times −η/2 they are the steps of A and of B."""

    A: Float[Tensor, "*batch m r"]
    B: Float[Tensor, "*batch n r"]


def spectral_directions(
    A: Float[Tensor, "*batch m r"],
    B: Float[Tensor, "*batch n r"],
    M_A: Float[Tensor, "*batch m r"],
    M_B: Float[Tensor, "*batch n r"],
    damping: float = RELATIVE_DAMPING,
) -> SpectralDirections:
    """Directions of both factors, in their dtype, from gradients of them or their running means M_A and M_B.

    Where A is zero, B stands still, and the other way round. What is not finite makes its own layer not finite.
    """
    R_A, R_B = inverse_root(A, damping), inverse_root(B, damping)
    return SpectralDirections(msign(M_A @ R_B) @ R_B, msign(M_B @ R_A) @ R_A)


def inverse_root(X: Float[Tensor, "*batch n r"], damping: float = 0.0) -> Float[Tensor, "*batch r r"]:
    """(XᵀX + δI)^−½ with δ = damping·‖XᵀX‖, computed in float64: zero along what is rounding, and where X is zero."""
    gram = X.double().mT @ X.double()
    norm = torch.linalg.matrix_norm(gram)[..., None, None]
    usable = torch.isfinite(norm) & (norm > 0)
    w, V = torch.linalg.eigh(torch.where(usable, gram / norm, 0.0))
    w = w[..., None, :] + damping
    root = torch.where(usable & (w > _NOISE), (w.clamp_min(_NOISE) * norm).rsqrt(), 0.0)
    return ((V * root) @ V.mT + 0 * norm).to(X)  # what is not finite is handed on


def msign(X: Float[Tensor, "*batch m r"]) -> Float[Tensor, "*batch m r"]:
    """U Vᵀ of X = U Σ Vᵀ without its directions of σ = 0."""
    return X @ inverse_root(X)
