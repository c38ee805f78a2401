"""Fira (2410.01623): Adam within the gradient's leading directions, and the rest of the gradient scaled alike."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from ..algebra.compressed_state import compress, expand, growth_limited, leading_rows
from ..models.heads import Head
from .method import Adapted, Family, Method
from .support.full_rank import FullRankOptimizer
from .support.own_optimizer import adam_direction
from .support.whole_weights import require_rank, train_whole


class FiraOptions(BaseModel):
    """Options of :class:`Fira`."""

    model_config = ConfigDict(extra="forbid")

    every: int = Field(default=200, ge=1, description="T: steps from one SVD of the gradient to the next.")


class Fira(Method):
    """U = PᵀR̃ + φ·(G − PᵀR) with R = PG, R̃ Adam's direction of R, φ_j = ‖R̃_j‖/‖R_j‖ for each of R's long side."""

    name = "fira"
    summary = "Fira (2410.01623): Adam in GaLore's subspace, the rest of the gradient scaled alike"
    family = Family.WHOLE
    packed = ()
    Options = FiraOptions
    lr_factor = 0.3
    has_alpha = False

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, FiraOptions)
        require_rank(model, self.spec, head)
        rank, every = self.spec.rank, self.options.every
        return train_whole(model, self.spec, head, lambda *given: FiraOptimizer(rank, every, *given))


class FiraOptimizer(FullRankOptimizer):
    """State of a weight m×n, m ≤ n: P (r×m), two moments (r×n) and the norm of the rest's last step."""

    def __init__(self, rank: int, every: int, *given: Any) -> None:
        super().__init__(*given)
        self.rank, self.every = rank, every

    def direction(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if (state["step"] - 1) % self.every == 0:
            state["rows"] = leading_rows(gradient, self.rank)
        P = state["rows"]
        R = compress(gradient, P)
        adam = adam_direction(R, state, group)
        short = 0 if weight.shape[0] < weight.shape[1] else 1
        phi = adam.norm(dim=short, keepdim=True) / (R.norm(dim=short, keepdim=True) + 1e-8)  # the paper's 1e-8
        rest = phi * (gradient - expand(R, P, weight.shape))
        rest, state["norm"] = growth_limited(rest, state.get("norm"))
        return expand(adam, P, weight.shape) + rest


METHODS = (Fira,)
