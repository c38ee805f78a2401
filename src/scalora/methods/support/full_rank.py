"""Optimizers of whole weights whose state is as small as a LoRA's; what is trained beside the weights gets AdamW."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from ...common.errors import ScaloraError


class FullRankOptimizer(Optimizer, ABC):
    """Steps W ← (1 − ηλ)W − η·U with U from :meth:`direction`; weight decay λ is decoupled, as AdamW's.

    Where Trainer neither clips nor accumulates nor scales gradients, each weight takes its step as soon as the backward
    pass has its gradient, which is then freed: of all dense gradients one is there at a time. The steps are the same.

    Args:
        matrices: the weights by name, float32; names seed what is random.
        others: all else that is trained.
        arguments: learning rate, betas, eps, weight decay and seed.

    Raises:
        ScaloraError: the arguments name another optimizer.
    """

    def __init__(
        self, matrices: Mapping[str, Tensor], others: Sequence[nn.Parameter], arguments: TrainingArguments
    ) -> None:
        if arguments.optim != TrainingArguments.__dataclass_fields__["optim"].default:
            name = getattr(arguments.optim, "value", arguments.optim)
            raise ScaloraError(f"training.optim is {name!r}, but this method is an optimizer itself: leave it out")
        decay = arguments.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": list(matrices.values()), "dense": True, "weight_decay": decay},
            {"params": [p for p in others if p.ndim > 1], "dense": False, "weight_decay": decay},
            {"params": [p for p in others if p.ndim <= 1], "dense": False, "weight_decay": 0.0},
        ]
        defaults = {
            "lr": arguments.learning_rate,
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
        }
        super().__init__([group for group in groups if group["params"]], defaults)
        self.names: dict[Tensor, str] = {weight: name for name, weight in matrices.items()}
        self.seed = arguments.seed
        self.at_once = not (arguments.max_grad_norm or arguments.fp16 or arguments.gradient_accumulation_steps > 1)
        if self.at_once:
            for weight in matrices.values():
                weight.register_post_accumulate_grad_hook(self._step_at_once)

    @abstractmethod
    def direction(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """U (m×n) of one weight at its step ``state["step"]``, counted from 1; keeps what it needs in ``state``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._move(param, group)
        return loss

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that are there at once, at most."""
        sizes = [(param.nbytes, group["dense"]) for group in self.param_groups for param in group["params"]]
        dense = [size for size, is_dense in sizes if is_dense]
        return (max(dense) if self.at_once else sum(dense)) + sum(size for size, is_dense in sizes if not is_dense)

    @torch.no_grad()
    def _step_at_once(self, weight: Tensor) -> None:
        self._move(weight, next(group for group in self.param_groups if group["dense"]))
        weight.grad = None

    def _move(self, param: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[param], param.grad
        assert gradient is not None
        state["step"] = state.get("step", 0) + 1
        U = self.direction(param, gradient, state, group) if group["dense"] else adam_direction(gradient, state, group)
        param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * U)


def adam_direction(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """m̂/(√v̂ + eps) of the gradients so far, this one included; ``state`` holds m, v and the number of steps."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    m, v, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    m_hat, v_hat = m / (1 - beta1 ** state["step"]), v / (1 - beta2 ** state["step"])
    return m_hat / (v_hat.sqrt() + group["eps"])
