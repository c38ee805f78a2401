"""The three ways in: any PyTorch loop, PEFT's own form, and what must come before FSDP2 shards a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..common.errors import ScaloraError, named
from .checkpoint import write_and_read_beside
from .chosen import choose_layers
from .config import ScaLoraConfig, as_config, refuse_settings
from .event import ScaLora
from .stores.adapter import make_room
from .stores.peft_model import carry
from .zero import attach_zero, zero_optimizer


def create_scalora_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    config: ScaLoraConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer over the model's trainable parameters that rescales the adapters as it steps.

    Args:
        model: a PEFT LoRA model.
        optimizer_cls: e.g. ``torch.optim.AdamW``.
        lr: learning rate.
        config: defaults to ``ScaLoraConfig()``; a dict of its fields is taken too.
        kwargs: passed on to ``optimizer_cls``.

    Returns:
        A plain instance of ``optimizer_cls``; use it in a loop, or as ``Trainer(optimizers=(optimizer, None))``.

    Raises:
        ScaloraError: as :func:`scalora.attach`; or ``optimizer_cls`` does not take these arguments.
    """
    config = as_config(config)
    if not callable(optimizer_cls):
        raise ScaloraError(f"optimizer_cls is {named(optimizer_cls)}: give a class, e.g. torch.optim.AdamW")
    refuse_settings(kwargs)
    choose_layers(model, config.unsupported, sketched=config.sketched)
    try:
        optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)  # pyright: ignore
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={named(value)}" for name, value in {"lr": lr, **kwargs}.items())
        name = getattr(optimizer_cls, "__name__", named(optimizer_cls))
        raise ScaloraError(f"optimizer_cls {name} does not take {given} ({error}): give what it takes") from error
    attach(model, optimizer, config)
    return optimizer


def attach(model: nn.Module, optimizer: Optimizer, config: ScaLoraConfig | Mapping[str, Any] | None = None) -> ScaLora:
    """Turn plain LoRA training into ScaLoRA: from now on ``optimizer.step()`` rescales the adapters when it is due.

    Args:
        model: a PEFT LoRA model, possibly compiled or wrapped for distribution.
        optimizer: a torch optimizer over its adapters, accelerate's wrapper of one, or DeepSpeed's of ZeRO-1 or 2.
        config: defaults to ``ScaLoraConfig()``; a dict of its fields is taken too.

    Raises:
        ScaloraError: something cannot be handled exactly; the message names it and the way out.

    Examples:
        >>> scalora.attach(model, optimizer)
        >>> for batch in loader: ...  # the usual loop
    """
    config = as_config(config)
    _ = config.period  # refused before anything is changed
    if (zero := zero_optimizer(optimizer)) is not None:
        handle = attach_zero(model, zero, config)
    else:
        handle = ScaLora(model, optimizer, config)
    write_and_read_beside(handle.model)
    return handle


def prepare(model: nn.Module, config: ScaLoraConfig | Mapping[str, Any] | None = None) -> None:
    """Let the layers carry accumulated columns now; :func:`attach` comes later.

    Needed before FSDP2 shards the model, or else every process keeps all of them, and before a checkpoint is loaded.

    Args:
        model: a PEFT LoRA model that is not sharded yet.
        config: what :func:`attach` will be given.

    Raises:
        ScaloraError: as :func:`attach`.
    """
    config = as_config(config)
    layers, _ = choose_layers(model, config.unsupported, sketched=config.sketched)
    if config.accumulate == "adapter":
        make_room(model, layers, config.columns)
    else:
        carry(model, layers, None)
    write_and_read_beside(model)
