"""What is trained beside the adapters, a head, in an optimizer that a method brings: as Trainer would have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from ...layers.peft_lora import AdapterLayer


def other_groups(
    model: nn.Module, layers: Sequence[AdapterLayer], arguments: TrainingArguments
) -> list[dict[str, Any]]:
    """Parameter groups of all that is trained but the adapters of ``layers``: weights, and biases and norms.

    Both have the arguments' learning rate, the first one their weight decay too. Empty groups are left out.
    """
    adapters = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType]
    groups: tuple[list[Any], list[Any]] = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapters:
            groups[name not in decayed].append(parameter)
    rate, decays = arguments.learning_rate, (arguments.weight_decay, 0.0)
    return [
        {"params": params, "lr": rate, "weight_decay": decay}
        for params, decay in zip(groups, decays, strict=True)
        if params
    ]


def regroup(
    optimizer: Optimizer, model: nn.Module, layers: Sequence[AdapterLayer], arguments: TrainingArguments
) -> Optimizer:
    """Keep the adapters' groups of an optimizer, with the arguments' weight decay; the rest joins :func:`other_groups`.

    The optimizer has not taken a step; it is changed in place and returned.
    """
    adapters = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in adapters]
        group["weight_decay"] = arguments.weight_decay
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in other_groups(model, layers, arguments):
        optimizer.add_param_group(group)
    return optimizer
