"""Which of PEFT's LoRA layers are s·A Bᵀ of two matrices of their own, and why others are not.

Only of these the columns can be rescaled without changing the function. The others may train beside them, as PEFT has
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .sharding import is_sharded


def why_inexact(module: LoraLayer, adapter: str) -> str:
    """Why an adapter of this layer is not s·A Bᵀ, and the way out; empty where it is."""
    if not isinstance(module.lora_A, nn.ModuleDict):
        return (
            f"is a {type(module).__name__} ({type(module).__module__.split('.')[-2]}): only plain LoRA can be "
            "rescaled; use LoraConfig"
        )
    if "Wrapper" in type(module).__name__:  # PEFT's ParamWrapper
        return (
            "adapts a bare parameter, as experts and routers are: only linear layers can be rescaled; name those in "
            "target_modules, e.g. ['q_proj', 'k_proj', 'v_proj', 'o_proj'], and set no target_parameters"
        )
    if adapter in module.lora_variant or module.use_dora.get(adapter, False):
        variant = type(module.lora_variant.get(adapter)).__name__
        return f"uses a LoRA variant ({variant}): only plain LoRA can be rescaled; switch the variant off"
    if adapter in module.lora_embedding_A:
        return "adapts an embedding, which is not supported: leave it out of target_modules"
    if not (isinstance(module.lora_A[adapter], nn.Linear) and isinstance(module.lora_B[adapter], nn.Linear)):
        base = type(module.get_base_layer()).__name__
        return f"adapts a {base}: only linear layers can be rescaled; leave it out of target_modules"
    if module.lora_bias.get(adapter, False):
        return "has lora_bias=True: train without it (LoraConfig(lora_bias=False))"
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
