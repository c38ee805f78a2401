"""LoRA with other steps around the recipe's optimizer, by PEFT's optimizers: LoRA+ and Riemannian preconditioning."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ..common.errors import ScaloraError
from ..layers.peft_lora import find_layers
from ..models.heads import Head
from .lora import Lora
from .method import Adapted, Family
from .support.own_optimizer import other_groups


class _Around(Lora):
    """LoRA by one of PEFT's optimizers around the recipe's, whichever that is."""

    family = Family.AROUND
    shards = False

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        adapted = super().adapt(model, head)

        def optimizer(arguments: TrainingArguments) -> Optimizer:
            cls, settings = _recipe_optimizer(arguments, adapted.model, self.name)
            return _regroup(self.create(adapted.model, cls, settings), adapted.model, arguments)

        adapted.optimizer = optimizer
        return adapted

    @abstractmethod
    def create(self, model: Any, cls: type[Optimizer], settings: dict[str, Any]) -> Optimizer:
        """PEFT's optimizer of a PEFT model, of the recipe's class and with its settings."""


class LoraPlusOptions(BaseModel):
    """Options of :class:`LoraPlus`."""

    model_config = ConfigDict(extra="forbid")

    ratio: float = Field(
        default=16.0, ge=1, allow_inf_nan=False, description="λ: the learning rate of lora_B over that of lora_A."
    )


class LoraPlus(_Around):
    """lora_A and the head have the recipe's learning rate, lora_B λ times as much, whatever the recipe's optimizer."""

    name = "lora+"
    summary = "LoRA+ (2402.12354): B learns faster than A"
    Options = LoraPlusOptions
    lr_factor = 0.5  # PEFT's advice beside a ratio: half of LoRA's

    def create(self, model: Any, cls: type[Optimizer], settings: dict[str, Any]) -> Optimizer:
        assert isinstance(self.options, LoraPlusOptions)
        return create_loraplus_optimizer(model, cls, loraplus_lr_ratio=self.options.ratio, **settings)


class RiemannianOptions(BaseModel):
    """Options of :class:`Riemannian`."""

    model_config = ConfigDict(extra="forbid")

    reg: float = Field(default=1e-2, gt=0, allow_inf_nan=False, description="δ, added to the diagonals of BᵀB and AAᵀ.")


class Riemannian(_Around):
    """(BᵀB + δI)⁻¹ g_A and g_B (AAᵀ + δI)⁻¹ go to the recipe's optimizer in place of the clipped gradients."""

    name = "riemannian"
    summary = "Riemannian preconditioned LoRA, ScaledAdam (2402.02347): each gradient scaled by the other matrix"
    Options = RiemannianOptions

    def create(self, model: Any, cls: type[Optimizer], settings: dict[str, Any]) -> Optimizer:
        assert isinstance(self.options, RiemannianOptions)
        return create_riemannian_optimizer(model, cls, reg=self.options.reg, **settings)


def _recipe_optimizer(arguments: TrainingArguments, model: Any, name: str) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class of the recipe's optimizer and its settings, the learning rate among them.

    Raises:
        ScaloraError: it chooses its parameters itself, so that nothing can be put around it.
    """
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    own = {"params", "model", "optimizer_dict"} & settings.keys()
    if own or not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        optim = OptimizerNames(arguments.optim).value
        raise ScaloraError(
            f"training.optim is {optim!r}, which chooses itself what it trains; method {name} needs an ordinary "
            "optimizer, e.g. adamw_torch"
        )
    return cls, settings


def _regroup(optimizer: Optimizer, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
    """Keep the adapters' groups, with the arguments' weight decay; the rest is grouped as Trainer does.

    The optimizer has not taken a step; it is changed in place and returned.
    """
    adapters = [p for layer in find_layers(model) for p in (layer.lora_A, layer.lora_B)]
    ids = {id(p) for p in adapters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in ids]
        group["weight_decay"] = arguments.weight_decay
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in other_groups(model, adapters, arguments):
        optimizer.add_param_group(group)
    return optimizer


METHODS = (LoraPlus, Riemannian)
