"""Stable-LoRA (2603.05204): PEFT's A, which starts at random, shrinks until it no longer outweighs B."""

from __future__ import annotations

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, TrainingArguments

from ..algebra.balancing import weighs_more
from ..layers.sharding import gather_full, local_shard
from ..models.heads import Head
from .lora import lora_model
from .method import Adapted, Family, Method
from .support.around_steps import AroundSteps, around_lora

_KEY = "still_shrinks"  # of the state of A: 1 or 0


class StableLoraOptions(BaseModel):
    """Options of :class:`StableLora`."""

    model_config = ConfigDict(extra="forbid")

    shrink: float = Field(
        default=0.005, gt=0, lt=1, description="λ: what A loses before each step; published 0.0005 to 0.005."
    )


class StableLora(Method):
    """LoRA whose A ← (1 − λ)A before each step while ‖A‖_F/n ≥ ‖B‖_F/m, in PEFT's names; then never again."""

    name = "stable-lora"
    summary = "Stable-LoRA (2603.05204): A shrinks before each step until balanced with B"
    family = Family.AROUND
    Options = StableLoraOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, StableLoraOptions)
        peft_model = lora_model(model, self.spec, head)
        return around_lora(peft_model, head, StableLoraCallback(peft_model, self.options))


class StableLoraCallback(AroundSteps):
    """Shrinks before each step. Which layers still do is kept in the optimizer's state, so that a resumed run knows."""

    def __init__(self, model: PeftModel, options: StableLoraOptions) -> None:
        super().__init__(model)
        self.options = options

    def begin(self, args: TrainingArguments, steps: int) -> None:
        states = [self.optimizer.state.get(layer.lora_A, {}) for layer in self.layers]
        self.shrinks = [
            state.get(_KEY, torch.ones((), device=layer.lora_A.device))
            for state, layer in zip(states, self.layers, strict=True)
        ]

    def before(self) -> None:
        for i, layer in enumerate(self.layers):
            lora_A, lora_B = gather_full([layer.lora_A, layer.lora_B])
            self.shrinks[i] = self.shrinks[i] * weighs_more(lora_A.T, lora_B)
            local_shard(layer.lora_A).mul_(1 - self.options.shrink * self.shrinks[i])

    def after(self) -> None:
        for layer, shrinks in zip(self.layers, self.shrinks, strict=True):
            if layer.lora_A.grad is not None:  # else AdamW has no state of it yet, and would take ours for its own
                self.optimizer.state[layer.lora_A][_KEY] = shrinks


METHODS = (StableLora,)
