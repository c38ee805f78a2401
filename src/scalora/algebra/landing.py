"""The landing field: gradient descent near the matrices with orthonormal columns, without ever projecting onto them.

Source: PoLAR (2506.03133), after Ablin and Peyré, "Fast and accurate optimization on the orthogonal manifold without
retraction" (2102.07432).
"""

from __future__ import annotations

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
