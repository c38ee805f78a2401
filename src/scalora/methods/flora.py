"""Flora (2402.03293): Adafactor whose momentum is kept in a random subspace that changes every κ steps."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from ..algebra.compressed_state import compress, expand, factored_scaled, random_rows
from ..engine.optimizers import innermost
from ..models.heads import Head
from .method import Adapted, Family, Method
from .support.full_rank import FullRankOptimizer
from .support.whole_weights import require_rank, train_whole

LONGEST = 1000  # the paper's κ
_EPS_SQUARE, _EPS_SCALE, _DECAY = 1e-30, 1e-3, -0.8  # Adafactor's


class FloraOptions(BaseModel):
    """Options of :class:`Flora`."""

    model_config = ConfigDict(extra="forbid")

    every: int = Field(
        default=0,
        ge=0,
        description="κ: steps from one random subspace to the next; 0: a sixth of the run, 1000 at most.",
    )


class Flora(Method):
    """U = max(10⁻³, RMS(W))·u/max(1, RMS(u)), u = (1 − β₁)h + β₁Pᵀc: h is Adafactor's scaled gradient, c ≈ P·momentum.

    The learning rate is relative to the weights' own size.
    """

    name = "flora"
    summary = "Flora (2402.03293): Adafactor with its momentum in a random subspace"
    family = Family.WHOLE
    packed = ()
    Options = FloraOptions
    has_alpha = False

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, FloraOptions)
        require_rank(model, self.spec, head)
        rank, every = self.spec.rank, self.options.every
        adapted = train_whole(model, self.spec, head, lambda *given: FloraOptimizer(rank, every or LONGEST, *given))
        if not every:
            adapted.callbacks.append(_PeriodOfTheRun())
        return adapted


class _PeriodOfTheRun(TrainerCallback):
    """Sets κ when the number of steps is known."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        optimizer = innermost(kwargs["optimizer"])
        assert isinstance(optimizer, FloraOptimizer)
        optimizer.every = min(LONGEST, max(1, state.max_steps // 6))


class FloraOptimizer(FullRankOptimizer):
    """State of a weight m×n, m ≤ n: the compressed momentum (r×n), and m + n numbers of second moments."""

    def __init__(self, rank: int, every: int, *given: Any) -> None:
        super().__init__(*given)
        self.rank, self.every = rank, every

    def direction(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        step, beta1 = state["step"], group["betas"][0]
        square = gradient.square() + _EPS_SQUARE
        if step == 1:
            state["row"], state["column"] = torch.zeros_like(square[:, 0]), torch.zeros_like(square[0])
        state["row"].lerp_(square.mean(1), step**_DECAY)
        state["column"].lerp_(square.mean(0), step**_DECAY)
        h = factored_scaled(gradient, state["row"], state["column"])

        P = self._rows(weight, gradient, step - 1)
        c = state.get("momentum", torch.zeros_like(compress(h, P)))
        momentum = expand(c, P, weight.shape)
        u = torch.lerp(h, momentum, beta1)
        if step % self.every == 0:
            P = self._rows(weight, gradient, step)
            c = compress(momentum, P)
        state["momentum"] = torch.lerp(compress(h, P), c, beta1)
        return max(_EPS_SCALE, rms(weight)) / max(1.0, rms(u)) * u

    def _rows(self, weight: Tensor, gradient: Tensor, steps: int) -> Tensor:
        """P after a number of steps, drawn again from its seed."""
        return random_rows(self.rank, min(weight.shape), gradient, self.seed, self.names[weight], steps // self.every)


def rms(tensor: Tensor) -> float:
    """The root of the mean of the squares."""
    return float(tensor.norm()) / tensor.numel() ** 0.5


METHODS = (Flora,)
