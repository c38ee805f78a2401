"""Optimizers of whole weights whose state is as small as a LoRA's; what is trained beside the weights gets AdamW."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from .own_optimizer import OwnOptimizer


class FullRankOptimizer(OwnOptimizer):
    """Steps W ← (1 − ηλ)W − η·U with U from :meth:`direction`; weight decay λ is decoupled, as AdamW's.

    Where one Trainer neither clips nor accumulates nor scales gradients, each weight takes its step as soon as the
    backward pass has its gradient, which is then freed: of all dense gradients one is there at a time. The steps are
    the same. Several processes have to agree on gradients first.

    Args:
        model: that is trained.
        matrices: its weights by name, float32; names seed what is random.
        arguments: Trainer's; they give the seed too.

    Raises:
        ScaloraError: the arguments name an optimizer other than AdamW.
    """

    def __init__(self, model: nn.Module, matrices: Mapping[str, Tensor], arguments: TrainingArguments) -> None:
        super().__init__(model, matrices.values(), arguments)
        self.names: dict[Tensor, str] = {weight: name for name, weight in matrices.items()}
        self.seed = arguments.seed
        waits = arguments.fp16 or arguments.gradient_accumulation_steps > 1 or arguments.world_size > 1
        self.at_once = not (arguments.max_grad_norm or waits)
        if self.at_once:
            for weight in matrices.values():
                weight.register_post_accumulate_grad_hook(self._step_at_once)

    @abstractmethod
    def direction(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """U (m×n) of one weight at its step ``state["step"]``, counted from 1; keeps what it needs in ``state``."""

    def step_own(self) -> None:
        for group in self.param_groups:
            for weight in group["params"] if group["own"] else ():
                if weight.grad is not None:
                    self._move(weight, group)

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that are there at once, at most."""
        sizes = [(param.nbytes, group["own"]) for group in self.param_groups for param in group["params"]]
        own = [size for size, is_own in sizes if is_own]
        return (max(own) if self.at_once else sum(own)) + sum(size for size, is_own in sizes if not is_own)

    @torch.no_grad()
    def _step_at_once(self, weight: Tensor) -> None:
        self._move(weight, next(group for group in self.param_groups if group["own"]))
        weight.grad = None

    def _move(self, weight: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        state["step"] = state.get("step", 0) + 1
        U = self.direction(weight, gradient, state, group)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * U)
