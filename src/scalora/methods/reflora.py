"""RefLoRA (2505.18877): of all factors with one product, steps are taken as those would that are balanced."""

from __future__ import annotations

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, TrainingArguments

from ..algebra.balancing import FactorGrams, Refactoring, refactoring, refactoring_scale
from ..engine.groups import gather_group
from ..engine.optimizers import carry_state
from ..layers.sharding import copy_into, local_shard
from ..models.heads import Head
from .lora import lora_model
from .method import Adapted, Family, Method
from .support.around_steps import AroundSteps, Carried, around_lora, gathered, turn_state

_PUBLISHED_WARMUP = 100


class RefLoraSOptions(BaseModel):
    """Options of :class:`RefLoraS`."""

    model_config = ConfigDict(extra="forbid")

    warmup: int | None = Field(
        default=None, ge=0, description="Steps of plain LoRA before; None: a tenth of the run, at most 100."
    )


class RefLoraOptions(RefLoraSOptions):
    """Options of :class:`RefLora`."""

    carry: Carried = Field(
        default="both",
        description="The optimizer's moments that follow when S̃ changes: none (as published), first or both.",
    )


class RefLora(Method):
    """LoRA whose gradients are turned by S̃⁻¹ and S̃; the matrices themselves are not refactored."""

    name = "reflora"
    summary = "RefLoRA (2505.18877): gradients as of balanced A and B with the same product"
    family = Family.AROUND
    Options = RefLoraOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, RefLoraOptions)
        peft_model = lora_model(model, self.spec, head)
        return around_lora(peft_model, head, RefLoraCallback(peft_model, self.options))


class RefLoraS(Method):
    """LoRA whose matrices have one norm: after each step both are rescaled, and the optimizer's state with them."""

    name = "reflora-s"
    summary = "RefLoRA-S (2505.18877): A and B scaled to one norm after each step"
    family = Family.AROUND
    Options = RefLoraSOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, RefLoraSOptions)
        peft_model = lora_model(model, self.spec, head)
        return around_lora(peft_model, head, RefLoraSCallback(peft_model, self.options))


class _Warmed(AroundSteps):
    carries_state = True

    def __init__(self, model: PeftModel, options: RefLoraSOptions) -> None:
        super().__init__(model)
        self.options = options

    def begin(self, args: TrainingArguments, steps: int) -> None:
        chosen = self.options.warmup
        self.warmup = min(_PUBLISHED_WARMUP, steps // 10) if chosen is None else chosen


class RefLoraCallback(_Warmed):
    """Turns gradients before each step, and moments after it: from then on they belong to the next step's S̃."""

    def __init__(self, model: PeftModel, options: RefLoraOptions) -> None:
        super().__init__(model, options)
        self.carried: Carried = options.carry

    def before(self) -> None:
        self.present: list[Refactoring] | None = None
        if self.step < self.warmup:
            return
        self.present = self._refactorings()
        for group, S in zip(self.groups, self.present, strict=True):
            now = gather_group(group)
            turned = [*(now.grad_A.double() @ S.S), *(now.grad_B.double() @ S.inverse).mT]
            pairs = zip([*group.A, *group.Bt], turned, strict=True)
            there = [(p.grad, g.to(p.grad)) for p, g in pairs if p.grad is not None]
            copy_into([grad for grad, _ in there], [g for _, g in there])

    def after(self) -> None:
        if self.carried == "none" or self.step + 1 < self.warmup:
            return
        for i, (group, new) in enumerate(zip(self.groups, self._refactorings(), strict=True)):
            of_A, of_B = new
            if self.present is not None:
                of_A, of_B = self.present[i].inverse @ of_A, self.present[i].S @ of_B
            turn_state(self.optimizer, group, of_A, of_B, self.carried)

    def _refactorings(self) -> list[Refactoring]:
        return [refactoring(FactorGrams.of(gathered(group.A), gathered(group.Bt).mT)) for group in self.groups]


class RefLoraSCallback(_Warmed):
    """Rescales after each step; a gradient goes with the inverse of its matrix's factor, and so do its moments."""

    def after(self) -> None:
        if self.step + 1 < self.warmup:
            return
        for group in self.groups:
            P = refactoring_scale(FactorGrams.of(gathered(group.A), gathered(group.Bt).mT)).to(group.A[0].dtype)
            params, factors = [*group.A, *group.Bt], [*(1 / P), *P]
            torch._foreach_mul_([local_shard(p) for p in params], factors)
            carry_state(self.optimizer, params, [1 / factor for factor in factors])


METHODS = (RefLora, RefLoraS)
