"""What optimizers of LoRA's pairs share: they find the pairs, and may clip all gradients together."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ...algebra.precision import exact_matmul
from ...common.errors import ScaloraError
from ...layers.peft_lora import find_layers
from .own_optimizer import OwnOptimizer


@dataclasses.dataclass(frozen=True)
class PairSide:
    """One factor of a pair; seen from it the adapted weight is W + scale · factor @ partnerᵀ (or that transposed).

    All are views: writing to ``factor`` changes the parameter, and what ``state`` holds is saved with the optimizer.
    """

    factor: Tensor  # (k, r): lora_B, or lora_A transposed
    gradient: Tensor  # (k, r)
    partner: Tensor  # (l, r)
    scale: float
    state: dict[str, Any]  # of the factor's parameter
    group: dict[str, Any]  # lr, betas, eps, weight_decay

    def count(self) -> int:
        """The number of this step, from 1."""
        self.state["step"] = self.state.get("step", 0) + 1
        return self.state["step"]

    def move(self, direction: Tensor) -> None:
        """AdamW's step: decay, decoupled, and then −lr · direction (k, r)."""
        self.factor.mul_(1 - self.group["lr"] * self.group["weight_decay"])
        self.factor.sub_(direction, alpha=self.group["lr"])


class PairOptimizer(OwnOptimizer):
    """Optimizer of all that a model trains: the pairs of LoRA's matrices as a subclass has it, the rest by AdamW.

    Pairs are those of one module each. Gradients are float32, as PEFT keeps its adapters.

    Args:
        model: one that :func:`~scalora.layers.peft_lora.find_layers` accepts.
        arguments: Trainer's; ``max_grad_norm`` is set to 0 where the subclass clips by itself (``clips``).

    Raises:
        ScaloraError: the arguments name an optimizer other than AdamW.
    """

    clips = False  # by norms of its own, for which it calls ``clip``

    def __init__(self, model: nn.Module, arguments: TrainingArguments) -> None:
        self.layers = find_layers(model)
        super().__init__(model, [p for layer in self.layers for p in (layer.lora_A, layer.lora_B)], arguments)
        self.max_norm = 0.0
        if self.clips:
            self.max_norm, arguments.max_grad_norm = arguments.max_grad_norm or 0.0, 0.0

    @abstractmethod
    def step_pairs(self, pairs: Sequence[tuple[PairSide, PairSide]]) -> None:
        """Move all pairs that have gradients; the side of lora_B comes first."""

    def step_own(self) -> None:
        pairs = self._pairs()
        if pairs:
            with exact_matmul(pairs[0][0].factor.device):
                self.step_pairs(pairs)

    def clip(self, squares: Sequence[Tensor]) -> Tensor | float:
        """The factor that brings all gradients together to norm ``max_norm`` where it is more; the rest is multiplied.

        Args:
            squares: squared norms (0-dimensional) of the pairs' gradients, as the subclass measures them.
        """
        if not self.max_norm:
            return 1.0
        rest = [p.grad for g in self.param_groups if not g["own"] for p in g["params"] if p.grad is not None]
        total = torch.stack([*squares, *(grad.square().sum() for grad in rest)]).sum().sqrt()
        factor = (self.max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in rest:
            grad.mul_(factor)
        return factor

    def _pairs(self) -> list[tuple[PairSide, PairSide]]:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        pairs: list[tuple[PairSide, PairSide]] = []
        for layer in self.layers:
            A, B = layer.lora_A, layer.lora_B
            if A.grad is not None and B.grad is not None:
                below = PairSide(B, B.grad, A.T, layer.scale, self.state[B], groups[id(B)])
                above = PairSide(A.T, A.grad.T, B, layer.scale, self.state[A], groups[id(A)])
                pairs.append((below, above))
        sums = [side.gradient.sum() for pair in pairs for side in pair]
        if sums and not torch.stack(sums).isfinite().all():
            raise ScaloraError(
                "the gradients are no longer finite: training diverged; lower training.learning_rate "
                f"(it is {self.param_groups[0]['lr']:g} now), lengthen training.warmup_steps, or check the data; "
                "earlier checkpoints are as they were"
            )
        return pairs
