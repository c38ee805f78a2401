"""Coordinates in which a layer's inputs, and the gradients of its outputs, are alike in all directions.

The gradient of one token is g xᵀ. Over all tokens both x and g lie mostly along a few directions that all share, such
as the mean of the inputs. Steps along these move every output alike; what tells one token from another lies elsewhere.
With C the mean of |g|²·xxᵀ, D that of |x|²·ggᵀ (of G_tᵀG_t and G_tG_tᵀ, summed over tokens t), M = (C/λ + δI)^p and
N = (D/μ + δI)^p, where λ and μ are the means of their diagonals, W̃ = N W M has the gradient N⁻¹ G M⁻¹, in which they
count less. For W = A Bᵀ that means Ã = N A and B̃ = M B, with the gradients N⁻¹g_A and M⁻¹g_B.

A plain step in W̃ moves W along D^−2p G C^−2p. With p = ¼ that is what Adam would do if it knew more than the diagonal:
divide by the root of the gradients' second moments, of which D and C are the two Kronecker factors. With p = ½ it
divides by these moments themselves, as natural gradients do; δ then decides what is learnt, and no one δ does for all.

Source: the factors of K-FAC (1503.05671) with the exponents of Shampoo (1802.09568), taken apart between the two
matrices of LoRA. Derived.

Neither C nor D is formed. The leading eigenvectors come from C Φ (n×k; Nyström), Φ being those of last time, so that
they get better from one look to the next; what is left of the trace is spread over all other directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float
from .batched import orthonormal, together
from .directions import Directions, optimal_adapters, sketched_svd

EXPONENT = 0.25  # p, where nobody says another
DAMPING = 0.01  # δ: with the exponent ¼ a tenth of it is as good; it only keeps M⁻¹ finite


class Whitening(NamedTuple):
    """C/λ ≈ U diag(e) Uᵀ + tail·(I − UUᵀ), C (n×n) the second moments of some vectors, λ the mean of its diagonal."""

    U: Float[Tensor, "*batch n k"]
    e: Float[Tensor, "*batch k"]
    tail: Float[Tensor, "*batch"]
    exponent: float = EXPONENT  # p

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All but the exponent."""
        return self.U, self.e, self.tail

    def at(self, i: int | Sequence[int]) -> Whitening:
        """One, or some, of several."""
        index = i if isinstance(i, int) else list(i)
        return Whitening(*(part[index] for part in self.tensors), exponent=self.exponent)

    def root(self, power: int) -> Root:
        """M to a power, for all that is multiplied by it."""
        others = (self.tail + DAMPING)[..., None, None].pow(power * self.exponent)
        return Root(self.U, (self.e + DAMPING)[..., None, :].pow(power * self.exponent) - others, others)

    def whiten(self, X: Float[Tensor, "*batch n j"]) -> Float[Tensor, "*batch n j"]:
        """M⁻¹X: a gradient into the white coordinates, or a step out of them."""
        return self.root(-1).times(X)

    def color(self, X: Float[Tensor, "*batch n j"]) -> Float[Tensor, "*batch n j"]:
        """M X: a parameter into the white coordinates."""
        return self.root(1).times(X)


class Root(NamedTuple):
    """U diag(along) Uᵀ + others·I, a symmetric n×n matrix."""

    U: Float[Tensor, "*batch n k"]
    along: Float[Tensor, "*batch _ k"]
    others: Float[Tensor, "*batch _ _"]

    def times(self, X: Float[Tensor, "*batch n j"]) -> Float[Tensor, "*batch n j"]:
        """Its product with X; Xᵀ lies there row by row."""
        rows = X.mT.contiguous()  # a few long rows: on a CPU a third of the time of as many columns
        return (self.others * rows + (self.along * (rows @ self.U)) @ self.U.mT).mT


class Seen(NamedTuple):
    """What a look has seen of some vectors whose whitening so far is ``former``, Φ its U."""

    former: Whitening
    product: Float[Tensor, "*batch n k"]  # C Φ, up to a factor
    trace: Float[Tensor, "*batch"]  # of C, up to the same


def no_whitening(basis: Float[Tensor, "*batch n k"], exponent: float = EXPONENT) -> Whitening:
    """Vectors that are alike in all directions; the basis (orthonormal columns) is what is looked along next."""
    *batch, _, k = basis.shape
    return Whitening(basis, basis.new_ones(*batch, k), basis.new_ones(batch), exponent)


def nystrom(sides: Sequence[Seen], keep: float) -> list[Whitening]:
    """The whitenings of keep·(what was known) + (1 − keep)·C/λ; the former one where C is nothing finite.

    Args:
        sides: each (L, …), of any sizes; small matrices of one size are factorised in one call for all.
        keep: from 0 to 1.
    """
    usable = [torch.isfinite(x.product.sum((-2, -1))) & torch.isfinite(x.trace) & (x.trace > 0) for x in sides]
    seen, cores = [], []
    for (former, product, trace), good in zip(sides, usable, strict=True):
        Phi, n = former.U, product.shape[-2]
        # Where there is nothing to go by, the identity is computed with, and not returned: nobody waits for the device.
        found = torch.where(good[..., None, None], product * (n / trace)[..., None, None], Phi)
        seen.append(torch.lerp(found, Phi * former.e[..., None, :], keep))
        cores.append((Phi.mT @ seen[-1]).double())
    roots = together(_inverse_root, cores)
    # C ≈ S (ΦᵀCΦ)⁻¹ Sᵀ with S = CΦ = QR: the eigenvectors are Q's columns, turned by those of a k×k matrix.
    bases = orthonormal(seen, [side.former.U for side in sides])
    halves = [Q.mT @ S.double() @ root for Q, S, (root,) in zip(bases, seen, roots, strict=True)]
    turned = together(torch.linalg.eigh, [half @ half.mT for half in halves])
    return [
        _where(good, Q @ W.flip(-1), e.flip(-1).clamp_min(0), side.former)
        for side, good, Q, (e, W) in zip(sides, usable, bases, turned, strict=True)
    ]


def _inverse_root(core: Tensor) -> tuple[Tensor]:
    """V w^−½ of a symmetric matrix V w Vᵀ, without what is small."""
    w, V = torch.linalg.eigh((core + core.mT) / 2)
    return (V * torch.where(w > 1e-5 * w[..., -1:], w.clamp_min(1e-300).rsqrt(), 0.0)[..., None, :],)


def _where(good: Tensor, U: Tensor, e: Tensor, former: Whitening) -> Whitening:
    """Eigenvectors and values that were found, what is left of n being the tail, where they are good."""
    tail = (U.shape[-2] - e.sum(-1)).clamp_min(0) / max(1, U.shape[-2] - U.shape[-1])
    return Whitening(
        torch.where(good[..., None, None], U.to(former.U), former.U),
        torch.where(good[..., None], e.to(former.e), former.e),
        torch.where(good, tail.to(former.tail), former.tail),
        former.exponent,
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
