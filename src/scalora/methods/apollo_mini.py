"""APOLLO-Mini (2412.05270): SGD whose step length per weight is Adam's, seen through one random direction."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from ..algebra.compressed_state import compress, growth_limited, random_rows
from ..models.heads import Head
from .method import Adapted, Family, Method
from .support.full_rank import FullRankOptimizer
from .support.own_optimizer import adam_direction
from .support.whole_weights import train_whole


class ApolloMiniOptions(BaseModel):
    """Options of :class:`ApolloMini`."""

    model_config = ConfigDict(extra="forbid")

    scale: float = Field(default=math.sqrt(128), gt=0, description="α: what every step is multiplied by.")
    every: int = Field(default=200, ge=1, description="T: steps from one random direction to the next.")


class ApolloMini(Method):
    """U = α·G·‖R̃‖/‖R‖ with R = PG, P one random row, R̃ Adam's direction of R; ‖U‖ grows by 1 % a step at most."""

    name = "apollo-mini"
    summary = "APOLLO-Mini (2412.05270): SGD with Adam's step length per weight, seen through one random direction"
    family = Family.WHOLE
    packed = ()
    Options = ApolloMiniOptions
    lr_factor = 0.1
    has_alpha = False

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, ApolloMiniOptions)
        options = self.options
        return train_whole(model, self.spec, head, lambda *given: ApolloMiniOptimizer(options, *given))


class ApolloMiniOptimizer(FullRankOptimizer):
    """State of a weight m×n: 2·max(m, n) + 1 numbers; P is drawn again from its seed at every step."""

    def __init__(self, options: ApolloMiniOptions, *given: Any) -> None:
        super().__init__(*given)
        self.options = options

    def direction(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        period = (state["step"] - 1) // self.options.every
        P = random_rows(1, min(weight.shape), gradient, self.seed, self.names[weight], period)
        R = compress(gradient, P)
        size = R.norm()
        # Where R is zero the gradient is, or all but; Adam's direction is not, after others.
        sigma = torch.where(size > 0, adam_direction(R, state, group).norm() / size, 0.0)
        U, state["norm"] = growth_limited(self.options.scale * sigma * gradient, state.get("norm"))
        return U


METHODS = (ApolloMini,)
