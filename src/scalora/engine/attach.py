"""The three ways in: any PyTorch loop, PEFT's own form, and what must come before FSDP2 shards a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..layers.peft_lora import find_layers
from .config import ScaLoraConfig
from .event import ScaLora
from .stores.adapter import ensure_adapter


def create_scalora_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, config: ScaLoraConfig | None = None, **kwargs: Any
) -> Optimizer:
    """An optimizer over the model's trainable parameters that rescales the adapters as it steps.

    Args:
        model: a PEFT LoRA model.
        optimizer_cls: e.g. ``torch.optim.AdamW``.
        lr: learning rate.
        config: defaults to ``ScaLoraConfig()``.
        kwargs: passed on to ``optimizer_cls``.

    Returns:
        A plain instance of ``optimizer_cls``; use it in a loop, or as ``Trainer(optimizers=(optimizer, None))``.

    Raises:
        ScaloraError: as :func:`scalora.attach`.
    """
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)  # pyright: ignore
    attach(model, optimizer, config)
    return optimizer


def attach(model: nn.Module, optimizer: Optimizer, config: ScaLoraConfig | None = None) -> ScaLora:
    """Turn plain LoRA training into ScaLoRA: from now on ``optimizer.step()`` rescales the adapters when it is due.

    Args:
        model: a PEFT LoRA model, possibly compiled or wrapped for distribution.
        optimizer: a torch optimizer over its adapters, or accelerate's wrapper of one.
        config: defaults to ``ScaLoraConfig()``.

    Raises:
        ScaloraError: something cannot be handled exactly; the message names it and the way out.

    Examples:
        >>> scalora.attach(model, optimizer)
        >>> for batch in loader: ...  # the usual loop
    """
    return ScaLora(model, optimizer, config or ScaLoraConfig())


def prepare(model: nn.Module, config: ScaLoraConfig | None = None) -> None:
    """Add the accumulated adapter now, so that FSDP2 shards it with everything else; :func:`attach` comes later.

    Without it ``attach`` adds the adapter, and after ``fully_shard`` every process then keeps all of it.

    Args:
        model: a PEFT LoRA model that is not sharded yet.
        config: what :func:`attach` will be given.

    Raises:
        ScaloraError: as :func:`attach`.
    """
    config = config or ScaLoraConfig()
    if config.accumulate == "adapter":
        ensure_adapter(model, find_layers(model), config.capacity)
