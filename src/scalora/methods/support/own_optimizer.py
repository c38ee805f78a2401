"""Optimizers that a method brings: it steps its own parameters, torch's AdamW all else that is trained."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from transformers import Trainer, TrainingArguments

from ...common.errors import ScaloraError

PLAIN = ("adamw_torch", "adamw_torch_fused")  # what is trained beside gets, whichever is named


class OwnOptimizer(Optimizer, ABC):
    """All that a model trains: ``own`` as a subclass steps it, the rest, such as a head, as Trainer's AdamW would.

    Groups whose "own" is true are the subclass's; all have "lr", "betas", "eps" and "weight_decay".

    Args:
        model: that is trained.
        own: its parameters that the subclass steps, in one group.
        arguments: Trainer's; they give learning rate, betas, eps and weight decay.

    Raises:
        ScaloraError: the arguments name an optimizer other than AdamW.
    """

    def __init__(self, model: nn.Module, own: Iterable[Tensor], arguments: TrainingArguments) -> None:
        _refuse_optimizer(arguments)
        own = [*own]
        defaults = {
            "lr": arguments.learning_rate,
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
            "weight_decay": arguments.weight_decay,
            "own": False,
        }
        super().__init__([{"params": own, "own": True}, *other_groups(model, own, arguments)], defaults)

    @abstractmethod
    def step_own(self) -> None:
        """Step the parameters of the own groups that have gradients; called without recording gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_own()
        for group in self.param_groups:
            if not group["own"]:
                self._adamw(group)
        return loss

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


def other_groups(model: nn.Module, own: Iterable[Tensor], arguments: TrainingArguments) -> list[dict[str, Any]]:
    """Parameter groups of all that is trained but ``own``, as Trainer makes them: weights, and biases and norms.

    Both have the arguments' learning rate, the first one their weight decay too. Empty groups are left out.
    """
    ids = {id(p) for p in own}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType]
    groups: tuple[list[Any], list[Any]] = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in ids:
            groups[name not in decayed].append(parameter)
    rate, decays = arguments.learning_rate, (arguments.weight_decay, 0.0)
    return [
        {"params": params, "lr": rate, "weight_decay": decay}
        for params, decay in zip(groups, decays, strict=True)
        if params
    ]


def adam_direction(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """m̂/(√v̂ + eps) of the gradients so far, this one included, for an own parameter.

    ``state`` holds m, v and the number of this step, counted from 1.
    """
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    step, (beta1, beta2) = state["step"], group["betas"]
    m = state["exp_avg"].lerp_(gradient, 1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    direction = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return torch.div(m, direction, out=direction).div_(1 - beta1**step)


def _refuse_optimizer(arguments: TrainingArguments) -> None:
    for field in dataclasses.fields(TrainingArguments):
        value = getattr(arguments, field.name)
        value = getattr(value, "value", value)
        if field.name == "optim" and value in PLAIN:
            continue
        if field.name in ("optim", "optim_args", "optim_target_modules") and value != field.default:
            raise ScaloraError(
                f"training.{field.name} is {str(value)!r}, but this method is an optimizer itself, with AdamW for "
                "what is trained beside: leave it out, or choose another method"
            )
