"""LoRA-FA (2308.03303): only lora_B is trained, by a gradient that A's rows are divided out of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback

from ..engine.optimizers import innermost
from ..layers.peft_lora import AdapterLayer, find_layers
from ..models.heads import Head
from .lora import layer_spectra, lora_model
from .method import Adapted, Family, Method
from .peft_any import merged_adapted


class LoraFa(Method):
    """lora_A stays as it began; lora_B gets (1/s²) g_B (AAᵀ)⁻¹, whose step fits the full gradient's best.

    Source: arXiv 2308.03303, as PEFT's ``create_lorafa_optimizer``, which this is not. That one multiplies in bf16 and
    holds the whole model in one group, with Adam's constants fixed. Here the recipe's optimizer takes the step.
    """

    name = "lora-fa"
    summary = "LoRA-FA (2308.03303): A stays as it began; the gradient of B is the full one as far as A reaches"
    family = Family.AROUND

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


METHODS = (LoraFa,)
