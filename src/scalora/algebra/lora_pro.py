"""LoRA-Pro: the steps of a pair that move W = s·A Bᵀ as a dense step would, as far as the pair can.

To first order a pair moves W by s(A D_Bᵀ + D_A Bᵀ), whose nearest to N is P_A N + N P_B − P_A N P_B, with P_A and P_B
the projectors on the columns of A and B. The steps that do so differ by D_A − A X, D_B + B Xᵀ for any X (r×r). LoRA-Pro
takes those nearest to the gradients s N B and s NᵀA, by a Sylvester equation for X; as no X adds to these gradients'
own part, they are the steps of least norm. In the singular bases of A and B the equation is solved entry by entry.

Source: arXiv 2407.18242; the closed form is derived.
"""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

import torch

from ..common.shapes import Float
from .unmagnified import FactorBasis


def projected_gradient(
    A: FactorBasis, B: FactorBasis, grad_A: Float[torch.Tensor, "m r"], grad_B: Float[torch.Tensor, "n r"], s: float
) -> Float[torch.Tensor, "m n"]:
    """P_A G + G P_B − P_A G P_B from the pair's gradients s G B and s GᵀA: all of G = ∂ℓ/∂W that they tell."""
    along, right = A.unmagnify(grad_B), B.unmagnify(grad_A)
    beyond = right - A.Q @ (A.Q.mT @ right)
    return torch.cat([A.Q, beyond], 1) @ torch.cat([along, B.Q], 1).mT / s


def least_steps(
    A: FactorBasis, B: FactorBasis, N: Float[torch.Tensor, "m n"], s: float
) -> tuple[Float[torch.Tensor, "m r"], Float[torch.Tensor, "n r"]]:
    """D_A and D_B of least norm with s(A D_Bᵀ + D_A Bᵀ) = P_A N + N P_B − P_A N P_B."""
    right, left = N @ B.Q, N.mT @ A.Q
    both = A.Q.mT @ right
    # Both can make what lies in both spans: each makes the more of it, the larger its partner is.
    sizes = A.sigma[:, None].square() + B.sigma.square()
    shared = torch.where(sizes > 0, both / sizes, 0.0)
    step_A = B.magnify(right - A.Q @ both) + A.Q @ (shared * B.sigma) @ B.V.mT
    step_B = A.magnify(left - B.Q @ both.mT) + B.Q @ (shared * A.sigma[:, None]).mT @ A.V.mT
    return step_A / s, step_B / s
