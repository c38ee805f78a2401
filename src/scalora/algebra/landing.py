"""The landing field: gradient descent near the matrices with orthonormal columns, without projecting onto them.

Source: PoLAR (2506.03133), after Ablin and Peyré, "Fast and accurate optimization on the orthogonal manifold without
retraction" (2102.07432).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.shapes import Float


def landing_field(
    X: Float[Tensor, "*batch n r"], gradient: Float[Tensor, "*batch n r"], penalty: float
) -> Float[Tensor, "*batch n r"]:
    """(∇Xᵀ − X∇ᵀ)X + λ X(XᵀX − I): along the manifold, and back to it.

    The n×n matrix is never formed: ∇(XᵀX) − X(∇ᵀX) is the same in O(nr²), and λX(XᵀX − I) shares XᵀX with it.

    Args:
        X: (…, n, r), near to orthonormal columns.
        gradient: ∇ (…, n, r).
        penalty: λ.
    """
    gram = X.mT @ X
    return gradient @ gram - X @ (gradient.mT @ X) + penalty * (X @ gram - X)


def nearest_orthonormal(X: Float[Tensor, "*batch n r"]) -> Float[Tensor, "*batch n r"]:
    """X(XᵀX)^−½, the orthonormal columns nearest to those of X, in O(nr²) and float64; X where it has none."""
    gram = X.double().mT @ X.double()
    usable = torch.isfinite(gram).all(-1).all(-1)[..., None, None]
    w, V = torch.linalg.eigh(torch.where(usable, gram, torch.eye(gram.shape[-1]).to(gram)))
    usable = usable & (w[..., :1, None] > 1e-12 * w[..., -1:, None])
    root = w.clamp_min(torch.finfo(w.dtype).tiny).rsqrt()[..., None, :]
    return torch.where(usable, (X.double() @ ((V * root) @ V.mT)).to(X), X)
