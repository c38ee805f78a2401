"""LoRA-Pro (2407.18242): Adam on the gradient of W, as far as LoRA's two gradients tell it; then back to the pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..algebra.lora_pro import least_steps, projected_gradient
from ..algebra.unmagnified import factor_basis
from ..models.heads import Head
from .lora import Lora
from .method import Adapted
from .support.pair_optimizer import PairOptimizer, PairSide


class LoraPro(Lora):
    """LoRA's layers and files; the optimizer's state is that of full fine-tuning, two numbers per adapted weight."""

    name = "lora-pro"
    summary = "LoRA-Pro (2407.18242): LoRA that follows full fine-tuning's Adam, at its memory"

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        adapted = super().adapt(model, head)
        adapted.optimizer = lambda arguments: LoraProOptimizer(adapted.model, arguments)
        return adapted


class LoraProOptimizer(PairOptimizer):
    """Dense moments (m×n) in the adapters' dtype, with lora_B; Trainer clips the pairs' gradients before."""

    def step_pairs(self, pairs: Sequence[tuple[PairSide, PairSide]]) -> None:
        for below, above in pairs:
            A, B = factor_basis(below.factor), factor_basis(above.factor)
            G = projected_gradient(A, B, below.gradient, above.gradient, below.scale)
            if not below.state:
                below.state.update(exp_avg=torch.zeros_like(G), exp_avg_sq=torch.zeros_like(G))
            (beta1, beta2), step = below.group["betas"], below.count()
            first = below.state["exp_avg"].lerp_(G, 1 - beta1)
            second = below.state["exp_avg_sq"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
            N = (second / (1 - beta2**step)).sqrt_().add_(below.group["eps"])
            torch.div(first, N, out=N).div_(1 - beta1**step)
            for side, direction in zip((below, above), least_steps(A, B, N, below.scale), strict=True):
                side.move(direction)


METHODS = (LoraPro,)
