"""LoRA-RITE (2410.20625): LoRA by an adaptive optimizer whose steps of W do not depend on how W is split in two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from ..algebra.lora_rite import RiteMoments, no_rite_moments, rite_moments
from ..algebra.unmagnified import factor_basis
from ..models.heads import Head
from .lora import Lora
from .method import Adapted, Family
from .support.pair_optimizer import PairOptimizer, PairSide

SKIP = 1.0  # an unmagnified gradient of a larger root mean square is left out of the step, as published


class LoraRiteOptions(BaseModel):
    """Options of :class:`LoraRite`."""

    model_config = ConfigDict(extra="forbid")

    escape: bool = Field(
        default=False, description="Make up for second moments lost by changes of the basis (paper: true; code: false)."
    )


class LoraRite(Lora):
    """LoRA's layers and files; the optimizer's state takes what AdamW's does, and 2r² more for each pair."""

    name = "lora-rite"
    summary = "LoRA-RITE (2410.20625): steps that do not depend on how BA is split into B and A"
    family = Family.PAIRS
    shards = False
    Options = LoraRiteOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, LoraRiteOptions)
        adapted, escape = super().adapt(model, head), self.options.escape
        adapted.optimizer = lambda arguments: LoraRiteOptimizer(adapted.model, arguments, escape)
        return adapted


class LoraRiteOptimizer(PairOptimizer):
    """Moments of unmagnified gradients, clipped to ``max_grad_norm`` together; s is left to them, as published.

    Args:
        model: with LoRA.
        arguments: Trainer's; gives lr, betas and weight decay, and the norm that is clipped to.
        escape: the paper's escaped mass.
    """

    clips = True

    def __init__(self, model: nn.Module, arguments: TrainingArguments, escape: bool = False) -> None:
        super().__init__(model, arguments)
        self.escape = escape

    def step_pairs(self, pairs: Sequence[tuple[PairSide, PairSide]]) -> None:
        sides = [side for pair in pairs for side in pair]
        bases = [factor_basis(side.partner) for side in sides]  # of all, before any moves
        gradients = [_kept(basis.unmagnify(side.gradient)) for side, basis in zip(sides, bases, strict=True)]
        factor = self.clip([gradient.square().sum() for gradient in gradients])
        for side, basis, gradient in zip(sides, bases, gradients, strict=True):
            former = _read(side)
            moments = rite_moments(former, gradient * factor, basis.Q, side.count(), side.group["betas"], self.escape)
            side.state.update(moments._asdict())
            side.move(basis.magnify(moments.first))


def _read(side: PairSide) -> RiteMoments:
    if side.state:
        return RiteMoments(*(side.state[name] for name in RiteMoments._fields))
    return no_rite_moments(side.factor, side.partner)


def _kept(gradient: Tensor) -> Tensor:
    return torch.where(gradient.square().mean().sqrt() > SKIP, 0.0, gradient)


METHODS = (LoraRite,)
