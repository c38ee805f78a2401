"""BaLoRA (2605.31484): after each step the two matrices are balanced, their product unchanged."""

from __future__ import annotations

from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from ..algebra.balancing import FactorGrams, balancing_maps
from ..models.heads import Head
from .lora import lora_model
from .method import Adapted, Family, Method
from .support.around_steps import AroundSteps, Carried, around_lora, gathered, turn_parameters, turn_state


class BaLoraOptions(BaseModel):
    """Options of :class:`BaLora`."""

    model_config = ConfigDict(extra="forbid")

    carry: Carried = Field(
        default="first",
        description="The optimizer's moments that follow the matrices: none (as published), first or both.",
    )


class BaLora(Method):
    """LoRA whose matrices are UΣ^½ and Σ^½Vᵀ of their own product after every step."""

    name = "balora"
    summary = "BaLoRA (2605.31484): A and B balanced after each step, their product unchanged"
    family = Family.AROUND
    Options = BaLoraOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, BaLoraOptions)
        peft_model = lora_model(model, self.spec, head)
        return around_lora(peft_model, head, BaLoraCallback(peft_model, self.options))


class BaLoraCallback(AroundSteps):
    """Balances after each step; a gradient goes with the inverse map, and so do its moments."""

    carries_state = True

    def __init__(self, model: PeftModel, options: BaLoraOptions) -> None:
        super().__init__(model)
        self.carried: Carried = options.carry

    def after(self) -> None:
        for group in self.groups:
            maps = balancing_maps(FactorGrams.of(gathered(group.A), gathered(group.Bt).mT))
            turn_parameters(group, maps.of_A, maps.of_B)
            turn_state(self.optimizer, group, maps.of_B, maps.of_A, self.carried)


METHODS = (BaLora,)
