"""Coordinates in which a layer's inputs, and the gradients of its outputs, are alike in all directions.

The gradient of one token is g xᵀ. Over all tokens both x and g lie mostly along a few directions that all share, such
as the mean of the inputs. Steps along these move every output alike; what tells one token from another lies elsewhere.
With C the mean of |g|²·xxᵀ, D that of |x|²·ggᵀ (of G_tᵀG_t and G_tG_tᵀ, summed over tokens t), M = (C/λ + δI)^½ and
N = (D/μ + δI)^½, where λ and μ are the means of their diagonals, W̃ = N W M has the gradient N⁻¹ G M⁻¹, in which they
count as much as any other. For W = A Bᵀ that means Ã = N A and B̃ = M B, with the gradients N⁻¹g_A and M⁻¹g_B.

Source: the two Kronecker factors of the empirical Fisher matrix (K-FAC, 1503.05671; Shampoo, 1802.09568), taken apart
between the two matrices of LoRA. Derived; the damping δ is measured.

Neither C nor D is formed. The leading eigenvectors come from C Φ (n×k; Nyström), Φ being those of last time, so that
they get better from one look to the next; what is left of the trace is spread over all other directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float
from .directions import Directions, optimal_adapters, sketched_svd

DAMPING = 0.1  # δ


class Whitening(NamedTuple):
    """C/λ ≈ U diag(e) Uᵀ + tail·(I − UUᵀ), C (n×n) the second moments of some vectors, λ the mean of its diagonal."""

    U: Float[Tensor, "*batch n k"]
    e: Float[Tensor, "*batch k"]
    tail: Float[Tensor, "*batch"]

    def at(self, i: int | Sequence[int]) -> Whitening:
        """One, or some, of several."""
        index = i if isinstance(i, int) else list(i)
        return Whitening(*(part[index] for part in self))

    def whiten(self, X: Float[Tensor, "*batch n j"]) -> Float[Tensor, "*batch n j"]:
        """M⁻¹X: a gradient into the white coordinates, or a step out of them."""
        return self._power(X, -0.5)

    def color(self, X: Float[Tensor, "*batch n j"]) -> Float[Tensor, "*batch n j"]:
        """M X: a parameter into the white coordinates."""
        return self._power(X, 0.5)

    def _power(self, X: Tensor, power: float) -> Tensor:
        others = (self.tail[..., None, None] + DAMPING).pow(power)
        along = (self.e[..., None, :] + DAMPING).pow(power) - others
        rows = X.mT.contiguous()  # a few long rows: on a CPU a third of the time of as many columns
        return (others * rows + (along * (rows @ self.U)) @ self.U.mT).mT


def no_whitening(basis: Float[Tensor, "*batch n k"]) -> Whitening:
    """Vectors that are alike in all directions; the basis (orthonormal columns) is what is looked along next."""
    return Whitening(basis, basis.new_ones((*basis.shape[:-2], basis.shape[-1])), basis.new_ones(basis.shape[:-2]))


def nystrom(
    former: Whitening,
    product: Float[Tensor, "*batch n k"],
    trace: Float[Tensor, "*batch"],
    keep: float,
) -> Whitening:
    """The whitening of keep·(what was known) + (1 − keep)·C/λ; the former one where C is nothing finite.

    Args:
        former: its U is Φ.
        product: C Φ, up to a factor.
        trace: of C, up to the same.
        keep: from 0 to 1.
    """
    n, k = product.shape[-2:]
    Phi = former.U
    usable = torch.isfinite(product.sum((-2, -1))) & torch.isfinite(trace) & (trace > 0)
    # Where there is nothing to go by, the identity is computed with, and not returned: nobody waits for the device.
    seen = torch.where(usable[..., None, None], product * (n / trace)[..., None, None], Phi)
    seen = torch.lerp(seen, Phi * former.e[..., None, :], keep)
    core = (Phi.mT @ seen).double()
    w, V = torch.linalg.eigh((core + core.mT) / 2)
    root = torch.where(w > 1e-5 * w[..., -1:], w.clamp_min(1e-300).rsqrt(), 0.0)
    # C ≈ S (ΦᵀCΦ)⁻¹ Sᵀ with S = CΦ = QR: the eigenvectors are Q's columns, turned by those of a k×k matrix.
    Q, R = torch.linalg.qr(seen)
    half = R.double() @ (V * root[..., None, :])
    e, W = torch.linalg.eigh(half @ half.mT)
    U, e = Q @ W.flip(-1).to(Q), e.flip(-1).clamp_min(0)
    tail = (n - e.sum(-1)).clamp_min(0) / max(1, n - k)
    return Whitening(
        torch.where(usable[..., None, None], U, former.U),
        torch.where(usable[..., None], e.to(former.e), former.e),
        torch.where(usable, tail.to(former.tail), former.tail),
    )


def white_adapters(
    L: Float[Tensor, "*batch m k"],
    Z: Float[Tensor, "*batch n k"],
    outputs: Whitening,
    inputs: Whitening,
    rank: int,
    c: Float[Tensor, "*batch"],
) -> Directions:
    """Theorem 1 for N⁻¹ G M⁻¹, from L, whose columns N L span what that is sought in, and Z = GᵀL.

    A and B come back as they are, their gradients in the white coordinates. Columns of N A and M B have squared norm c.
    """
    Q, R = torch.linalg.qr(outputs.color(L))
    nothing = (L == 0).all(-1).all(-1)[..., None, None]  # the sketch overflowed; Z is zero too
    R = torch.where(nothing, torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), R)
    # Zᵀ = LᵀG, so that Qᵀ N⁻¹ G M⁻¹ = R⁻ᵀ (M⁻¹Z)ᵀ.
    white = torch.linalg.solve_triangular(R, inputs.whiten(Z), upper=True, left=False)
    found = optimal_adapters(sketched_svd(Q, white), rank, c)
    return found._replace(A=outputs.whiten(found.A), B=inputs.whiten(found.B))
