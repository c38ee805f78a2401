"""Which of PEFT's LoRA layers are s·A Bᵀ of two matrices of their own, and why others are not.

Only of these the columns can be rescaled without changing the function. The others may train beside them, as PEFT has
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from .layout import CONVOLUTIONS, is_linear
from .sharding import is_sharded, plain_class


def why_inexact(module: LoraLayer, adapter: str) -> str:
    """Why an adapter of this layer is not s·A Bᵀ, and the way out; empty where it is."""
    if not isinstance(module.lora_A, nn.ModuleDict):
        return (
            f"is a {type(module).__name__} ({type(module).__module__.split('.')[-2]}): only plain LoRA can be "
            "rescaled; use LoraConfig"
        )
    if adapter in module.lora_variant or module.use_dora.get(adapter, False):
        variant = type(module.lora_variant.get(adapter)).__name__
        return f"uses a LoRA variant ({variant}): only plain LoRA can be rescaled; switch the variant off"
    if module.scaling.get(adapter) == 0:
        return "has scale 0 (lora_alpha, alpha_pattern), so that nothing of it is trained: set another lora_alpha"
    if problem := _of_its_kind(module, adapter):
        return problem
    if module.lora_bias.get(adapter, False):
        return "has lora_bias=True: train without it (LoraConfig(lora_bias=False))"
    return ""


def is_bare(module: LoraLayer) -> bool:
    """Whether it adapts a parameter of a module (``target_parameters``), and not what the module computes."""
    return isinstance(module, ParamWrapper)


def _of_its_kind(module: LoraLayer, adapter: str) -> str:
    base: Any = module.get_base_layer()
    out = "leave it out of target_modules"
    if adapter in module.lora_embedding_A:
        if getattr(module, "tp_layer", None) is not None:
            return f"is split by tensor parallelism: {out}"
        if base.max_norm is not None or base.sparse or base.scale_grad_by_freq:
            return f"adapts an embedding with max_norm, sparse or scale_grad_by_freq, which no product has: {out}"
        return ""
    if is_bare(module):
        if any(map(is_sharded, own_tensors(module, adapter))):
            return "adapts a bare parameter that FSDP2 has sharded: use DDP, or set no target_parameters"
        return ""
    if plain_class(module.lora_A[adapter]) in CONVOLUTIONS:
        grouped = f"adapts a convolution in {base.groups} groups, whose weight is no such product: {out}"
        return grouped if base.groups > 1 else ""
    if not is_linear(module, adapter):
        return f"adapts a {type(base).__name__}: only linear layers, embeddings and convolutions can be rescaled; {out}"
    return ""


def trained_adapters(module: LoraLayer) -> list[str]:
    """Adapters of one layer that are active and being trained."""
    return [adapter for adapter in module.active_adapters if _is_trained(module, adapter)]


def sharing(layers: Sequence[tuple[LoraLayer, str]]) -> list[bool]:
    """For each layer and adapter, whether it holds a matrix that another of them holds too."""
    held = [own_tensors(*each) for each in layers]  # held on to: a computed matrix is another object at each look
    owners = Counter(place for tensors in held for place in {_place(t) for t in tensors})
    return [any(owners[_place(t)] > 1 for t in tensors) for tensors in held]


def own_tensors(module: LoraLayer, adapter: str) -> list[Tensor]:
    """Whatever belongs to an adapter of this layer."""
    found: list[Tensor] = []
    for kind in module.adapter_layer_names:
        parts = getattr(module, kind, None)
        part = parts[adapter] if isinstance(parts, nn.ModuleDict | nn.ParameterDict) and adapter in parts else None
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, nn.Module):
            weight = getattr(part, "weight", None)
            found += [weight] if isinstance(weight, Tensor) else list(part.parameters())
    return found


def _is_trained(module: LoraLayer, adapter: str) -> bool:
    if adapter in module.lora_embedding_A:
        return any(t.requires_grad for t in own_tensors(module, adapter))
    if adapter not in module.lora_A:
        return False
    first = module.lora_A[adapter]
    weight = first if isinstance(first, Tensor) else first.weight  # AdaLoRA's are bare parameters
    return weight.requires_grad  # pyright: ignore


def _place(tensor: Tensor) -> int:
    """Where it lies, for PEFT ties by parameters of their own on one memory; what it is, where it lies nowhere."""
    return id(tensor) if tensor.is_meta or is_sharded(tensor) else tensor.data_ptr() or id(tensor)
