"""Directions as a layer's inputs see them: their second moments, and Theorem 1 in the metric that these make.

A column b of B adds s·a·(bᵀx) to the output. Along directions that all inputs share, such as their mean, that is
large, and so is the gradient; what tells one input from another lies elsewhere. With C the (weighted) mean of xxᵀ and
λ that of its diagonal, M = ((C + δλI)/λ)^½ makes all directions of the input alike: the directions for Ã and B̃ are
those of G M⁻¹, back in W's space, and b is sized so that the mean of (bᵀx)² is a random column's.

A column a of Ã adds s·a·(dᵀx) when its partner in B moves by d. Adam's first steps have entries of one size,
d ∝ sign(Gᵀa), and lie along what all inputs share: with |a| = |b| they would move the output far more than b does, and
for all inputs alike. So a is sized to move it by as much. Derived; the damping δ is measured.

C is never formed. Its leading eigenvectors come from C Φ (n×k; Nyström), Φ being those of last time, so that they get
better from one time to the next; what is left of its trace is spread over all other directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float
from .directions import Directions, sketched_svd

DAMPING = 0.1  # δ


class InputMetric(NamedTuple):
    """C/λ ≈ U diag(e) Uᵀ + tail·(I − UUᵀ)."""

    U: Float[Tensor, "*batch n k"]
    e: Float[Tensor, "*batch k"]
    tail: Float[Tensor, "*batch"]

    def whiten(self, X: Float[Tensor, "*batch n j"]) -> Float[Tensor, "*batch n j"]:
        """M⁻¹X."""
        others = (self.tail[..., None, None] + DAMPING).rsqrt()
        along = (self.e[..., None] + DAMPING).rsqrt() - others
        return others * X + self.U @ (along * (self.U.mT @ X))

    def energy(self, X: Float[Tensor, "*batch n j"]) -> Float[Tensor, "*batch j"]:
        """xᵀ(C/λ)x of every column: 1 is a random unit column's."""
        seen = (self.U.mT @ X).square()
        return self.tail[..., None] * (X.square().sum(-2) - seen.sum(-2)) + (self.e[..., None] * seen).sum(-2)


def no_metric(basis: Float[Tensor, "n k"]) -> InputMetric:
    """Inputs that are alike in all directions; the basis (orthonormal columns) is what is looked along next."""
    return InputMetric(basis, basis.new_ones(basis.shape[-1]), basis.new_ones(()))


def nystrom_metric(
    former: InputMetric, product: Float[Tensor, "*batch n k"], trace: Float[Tensor, "*batch"]
) -> InputMetric:
    """The metric from C Φ and the trace of C, both up to one factor; the former one where they are nothing finite.

    Args:
        former: its U is Φ.
        product: C Φ.
        trace: of C.
    """
    n, k = product.shape[-2:]
    usable = torch.isfinite(product).all(-1).all(-1) & torch.isfinite(trace) & (trace > 0)
    basis = former.U.double()
    # Where there is nothing to go by, the identity is computed with, and not returned: nobody waits for the device.
    scaled = torch.where(usable[..., None, None], product.double() * (n / trace.double())[..., None, None], basis)
    core = basis.mT @ scaled
    w, V = torch.linalg.eigh((core + core.mT) / 2)
    root = torch.where(w > 1e-6 * w[..., -1:], w.clamp_min(1e-300).rsqrt(), 0.0)
    U, sigma, _ = torch.linalg.svd(scaled @ (V * root[..., None, :]), full_matrices=False)
    e = sigma.square()
    tail = (n - e.sum(-1)).clamp_min(0) / max(1, n - k)
    return InputMetric(
        torch.where(usable[..., None, None], U.to(former.U), former.U),
        torch.where(usable[..., None], e.to(former.e), former.e),
        torch.where(usable, tail.to(former.tail), former.tail),
    )


def metric_adapters(
    Q: Float[Tensor, "*batch m k"],
    Z: Float[Tensor, "*batch n k"],
    metric: InputMetric,
    rank: int,
    c: Float[Tensor, "*batch"],
) -> Directions:
    """Ã and B̃ of Theorem 1 in the inputs' metric from Q with orthonormal columns and Z = GᵀQ, and their gradients.

    A column of B̃ has the energy of a random column of squared norm c. One of Ã is such that a step of its partner in B,
    each entry as long as those of a step of A, changes the layer's output by as much as that step does.
    """
    m, n = Q.shape[-2], Z.shape[-2]
    svd = sketched_svd(Q, metric.whiten(Z))
    A, B = svd.U[..., 0 : 2 * rank : 2], metric.whiten(svd.V[..., 1 : 2 * rank : 2])
    # Along directions without energy a step would seem to do nothing: they count as damped, as in the metric.
    energy = metric.energy((Z @ (Q.mT @ A)).sign()).clamp_min(DAMPING * n)
    root = c.to(Z.dtype).sqrt()[..., None, None]
    A, B = root * A * (m / energy).sqrt()[..., None, :], root * B / metric.energy(B).sqrt()[..., None, :]
    return Directions(A, B, Q @ (Z.mT @ B), Z @ (Q.mT @ A))
