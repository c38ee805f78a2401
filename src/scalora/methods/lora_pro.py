"""LoRA-Pro (2407.18242): Adam on the gradient of W, as far as LoRA's two gradients tell it; then back to the pair."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..algebra.lora_pro import least_steps, projected_gradient
from ..algebra.unmagnified import factor_basis
from ..models.heads import Head
from .lora import Lora
from .method import Adapted, Family
from .support.own_optimizer import adam_direction
from .support.pair_optimizer import PairOptimizer, PairSide


class LoraPro(Lora):
    """LoRA's layers and files; the optimizer's state is that of full fine-tuning, two numbers per adapted weight."""

    name = "lora-pro"
    summary = "LoRA-Pro (2407.18242): follows full fine-tuning's Adam, with its memory"
    family = Family.PAIRS
    shards = False

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
            below.count()
            N = adam_direction(G, below.state, below.group)
            for side, direction in zip((below, above), least_steps(A, B, N, below.scale), strict=True):
                side.move(direction)


METHODS = (LoraPro,)
