"""What optimizers of LoRA's pairs share: they find the pairs, train the rest by AdamW, and keep state as torch does."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from transformers import TrainingArguments

from ...algebra.precision import exact_matmul
from ...common.errors import ScaloraError
from ...layers.peft_lora import find_layers


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


class PairOptimizer(Optimizer, ABC):
    """Optimizer of all that a model trains: the pairs of LoRA's matrices as a subclass has it, the rest by AdamW.

    Pairs are those of one module each. Classification heads and what else is trained get torch's AdamW with the same
    arguments; biases and norms do not decay, as with Trainer. Gradients are float32, as PEFT keeps its adapters.

    Args:
        model: one that :func:`~scalora.layers.peft_lora.find_layers` accepts.
        arguments: Trainer's; ``max_grad_norm`` is set to 0 where the subclass clips by itself (``clips``).

    Raises:
        ScaloraError: the arguments name an optimizer.
    """

    clips = False  # by norms of its own, for which it calls ``clip``

    def __init__(self, model: nn.Module, arguments: TrainingArguments) -> None:
        refuse_optimizer(arguments)
        self.layers = find_layers(model)
        adapters = [p for layer in self.layers for p in (layer.lora_A, layer.lora_B)]
        paired = {id(p) for p in adapters}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in paired]
        groups: list[dict[str, Any]] = [
            {"params": adapters, "pairs": True},
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        defaults = {
            "lr": arguments.learning_rate,
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
            "weight_decay": arguments.weight_decay,
            "pairs": False,
        }
        super().__init__([group for group in groups if group["params"]], defaults)
        self.max_norm = 0.0
        if self.clips:
            self.max_norm, arguments.max_grad_norm = arguments.max_grad_norm or 0.0, 0.0

    @abstractmethod
    def step_pairs(self, pairs: Sequence[tuple[PairSide, PairSide]]) -> None:
        """Move all pairs that have gradients; the side of lora_B comes first."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = self._pairs()
        if pairs:
            with exact_matmul(pairs[0][0].factor.device):
                self.step_pairs(pairs)
        for group in self.param_groups:
            if not group["pairs"]:
                self._adamw(group)
        return loss

    def clip(self, squares: Sequence[Tensor]) -> Tensor | float:
        """The factor that brings all gradients together to norm ``max_norm`` where it is more; the rest is multiplied.

        Args:
            squares: squared norms (0-dimensional) of the pairs' gradients, as the subclass measures them.
        """
        if not self.max_norm:
            return 1.0
        rest = [p.grad for g in self.param_groups if not g["pairs"] for p in g["params"] if p.grad is not None]
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

    def _adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip


def refuse_optimizer(arguments: TrainingArguments) -> None:
    """Raise ScaloraError where Trainer's arguments choose an optimizer, which a method that is one cannot follow."""
    for field in dataclasses.fields(TrainingArguments):
        value = getattr(arguments, field.name)
        if field.name in ("optim", "optim_args", "optim_target_modules") and value != field.default:
            raise ScaloraError(
                f"training.{field.name} is {str(getattr(value, 'value', value))!r}, but this method is an optimizer "
                "itself: leave it out, or choose another method"
            )
