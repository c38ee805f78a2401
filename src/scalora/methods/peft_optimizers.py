"""LoRA with other steps: LoRA+ and Riemannian preconditioning by PEFT's optimizers, and LoRA-FA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from ..common.errors import ScaloraError
from ..engine.optimizers import innermost
from ..layers.peft_lora import AdapterLayer, find_layers
from ..models.heads import Head
from .lora import layer_spectra, lora_model, lora_spectra, save_plain
from .method import Adapted, Method
from .peft_any import merged_adapted
from .support.others import regroup


class LoraPlusOptions(BaseModel):
    """Options of :class:`LoraPlus`."""

    model_config = ConfigDict(extra="forbid")

    ratio: float = Field(
        default=16.0, ge=1, allow_inf_nan=False, description="λ: the learning rate of lora_B over that of lora_A."
    )


class LoraPlus(Method):
    """lora_A and the head have the recipe's learning rate, lora_B λ times as much, whatever the recipe's optimizer."""

    name = "lora+"
    summary = "LoRA+ (2402.12354): lora_B learns faster than lora_A"
    Options = LoraPlusOptions
    lr_factor = 0.5  # PEFT's advice beside a ratio: half of LoRA's

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, LoraPlusOptions)
        ratio, peft_model = self.options.ratio, lora_model(model, self.spec, head)

        def optimizer(arguments: TrainingArguments) -> Optimizer:
            cls, settings = _recipe_optimizer(arguments, peft_model, self.name)
            made = create_loraplus_optimizer(peft_model, cls, loraplus_lr_ratio=ratio, **settings)
            return regroup(made, peft_model, find_layers(peft_model), arguments)

        return _lora_adapted(peft_model, head, optimizer)


class RiemannianOptions(BaseModel):
    """Options of :class:`Riemannian`."""

    model_config = ConfigDict(extra="forbid")

    reg: float = Field(default=1e-2, gt=0, allow_inf_nan=False, description="δ, added to the diagonals of BᵀB and AAᵀ.")


class Riemannian(Method):
    """(BᵀB + δI)⁻¹ g_A and g_B (AAᵀ + δI)⁻¹ go to the recipe's optimizer in place of the clipped gradients."""

    name = "riemannian"
    summary = "Riemannian preconditioned LoRA (2402.02347), also called ScaledAdam"
    Options = RiemannianOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, RiemannianOptions)
        reg, peft_model = self.options.reg, lora_model(model, self.spec, head)

        def optimizer(arguments: TrainingArguments) -> Optimizer:
            cls, settings = _recipe_optimizer(arguments, peft_model, self.name)
            made = create_riemannian_optimizer(peft_model, cls, reg=reg, **settings)
            return regroup(made, peft_model, find_layers(peft_model), arguments)

        return _lora_adapted(peft_model, head, optimizer)


class LoraFa(Method):
    """lora_A stays as it began; lora_B gets (1/s²) g_B (AAᵀ)⁻¹, whose step fits the full gradient's best.

    Source: arXiv 2308.03303, as PEFT's ``create_lorafa_optimizer``, which this is not. That one multiplies in bf16 and
    holds the whole model in one group, with Adam's constants fixed. Here the recipe's optimizer takes the step.
    """

    name = "lora-fa"
    summary = "LoRA-FA (2308.03303): lora_A frozen, the gradient of lora_B preconditioned"

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        peft_model = lora_model(model, self.spec, head)
        layers = find_layers(peft_model)  # while they are trained
        freeze_A = FreezeA(layers)
        save = merged_adapted(peft_model, head).save
        return Adapted(peft_model, save, lambda: layer_spectra(layers), [freeze_A])


class FreezeA(TrainerCallback):
    """Freezes lora_A, and preconditions the gradient of lora_B before each step of the optimizer."""

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        self.layers = layers
        self.hook: Any = None
        for layer in layers:
            layer.lora_A.requires_grad_(False)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # Constant while it is trained, and by now the resumed run's own.
        self.inverses = [fixed_A_inverse(layer.lora_A, layer.scale) for layer in self.layers]
        self.hook = innermost(kwargs["optimizer"]).register_step_pre_hook(self._precondition)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.hook.remove()

    @torch.no_grad()
    def _precondition(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for layer, inverse in zip(self.layers, self.inverses, strict=True):
            if (gradient := layer.lora_B.grad) is not None:
                gradient.copy_(gradient.to(inverse) @ inverse)


@torch.no_grad()
def fixed_A_inverse(lora_A: Tensor, scale: float) -> Tensor:
    """(1/s²)(A Aᵀ)⁻¹, (r, r), of lora_A (r, n): computed in float64, given in float32 or wider; a pseudo-inverse."""
    A = lora_A.double()
    inverse = torch.linalg.pinv(A @ A.mT, hermitian=True) / scale**2
    return inverse.to(torch.promote_types(lora_A.dtype, torch.float32))


def _lora_adapted(model: PeftModel, head: Head, optimizer: Any) -> Adapted:
    return Adapted(model, lambda path: save_plain(model, head, path), lambda: lora_spectra(model), optimizer=optimizer)


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


METHODS = (LoraPlus, Riemannian, LoraFa)
