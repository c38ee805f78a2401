"""The paper's A, B, s and base weight, as PEFT has them (with :mod:`.layout`, which knows its kinds of layers).

PEFT computes ΔW = s·lora_B.weight @ lora_A.weight. In the paper's symbols A (m×r) is ``lora_B.weight`` (out×r),
B (n×r) is ``lora_A.weight``ᵀ (in×r), and PEFT's gradients already carry s: with c/s² in place of c every formula holds,
and the difference that moves is s·A diag(1 − α∘β) Bᵀ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.errors import ScaloraError, named
from .accumulated import Accumulated
from .exactness import sharing, trained_adapters, why_inexact
from .layout import CONVOLUTIONS, experts, in_weight_layout, is_linear, is_plain, lora_a, lora_b
from .sharding import plain_class, refuse_flattened

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile's, and checkpointing's, part of a name


@dataclass(frozen=True)
class AdapterLayer:
    """One adapted weight. Tensors are looked up anew at every use: FSDP2 replaces parameter objects."""

    name: str
    module: LoraLayer
    adapter: str

    @property
    def A(self) -> nn.Parameter:
        """A, (m, r): ``lora_B.weight``; of a convolution (m, r, 1, …), of experts (m, r·E)."""
        return lora_b(self.module, self.adapter)

    @property
    def Bt(self) -> nn.Parameter:
        """Bᵀ, (r, n): ``lora_A.weight``; of a convolution (r, in, …), of experts (E·r, n)."""
        return lora_a(self.module, self.adapter)

    @property
    def lora_A(self) -> nn.Parameter:
        """PEFT's name of Bᵀ, (r, n)."""
        return self.Bt

    @property
    def lora_B(self) -> nn.Parameter:
        """PEFT's name of A, (m, r)."""
        return self.A

    @property
    def scale(self) -> float:
        """s of ΔW = s·A Bᵀ."""
        return float(self.module.scaling[self.adapter])

    @property
    def experts(self) -> int:
        """How many matrices it adapts, each by columns of its own."""
        return experts(self.module)

    @property
    def rank(self) -> int:
        return self.A.shape[1] // self.experts

    @property
    def shape(self) -> tuple[int, int]:
        """m and n, of each expert."""
        return self.A.shape[0], self.Bt.shape[1:].numel()

    @property
    def base(self) -> nn.Module:
        """The layer that PEFT wraps."""
        return self.module.get_base_layer()

    @property
    def weight(self) -> Tensor:
        """The frozen weight, as the layer has it."""
        if isinstance(self.base, nn.MultiheadAttention):
            return self.base.in_proj_weight
        return getattr(self.base, getattr(self.module, "parameter_name", "weight"))

    @property
    def base_weight(self) -> Tensor:
        """A view of the frozen weight as m×n, of experts E×m×n, whichever way the layer stores it."""
        weight = self.weight
        if isinstance(self.module, ParamWrapper):
            return weight.flatten(0, -2) if self.experts == 1 else in_weight_layout(self.module, self.adapter, weight)
        if weight.ndim > 2:
            return weight.view(weight.shape[0], -1)
        return weight.T if isinstance(self.base, Conv1D | nn.Embedding) else weight

    @property
    def accumulated(self) -> Accumulated:
        """The columns beside it, frozen."""
        return self.module.accumulated[self.adapter]  # pyright: ignore


def find_layers(model: nn.Module) -> list[AdapterLayer]:
    """The LoRA layers that are being trained, linear ones all of them, in the order of ``model.named_modules()``.

    Raises:
        ScaloraError: as :func:`sort_layers`; or a layer's update is not s·A Bᵀ of its own two matrices (embeddings,
            convolutions, DoRA and other variants, biases, shared weights).
    """
    layers, others = sort_layers(model)
    for layer, why in others.items():
        raise ScaloraError(f"layer {layer.name} {why}")
    for layer in layers:
        if not is_linear(layer.module, layer.adapter):
            base = "Parameter" if isinstance(layer.module, ParamWrapper) else type(layer.base).__name__
            raise ScaloraError(
                f"layer {layer.name} adapts {'an' if base[0] in 'AEIOU' else 'a'} {base}, which ScaLoRA alone can "
                "rescale: leave it out of target_modules (target_parameters)"
            )
    return layers


def sort_layers(model: nn.Module) -> tuple[list[AdapterLayer], dict[AdapterLayer, str]]:
    """The LoRA layers that are being trained: those that can be rescaled; the others, and why they cannot.

    Raises:
        ScaloraError: no trainable LoRA layer, several trainable adapters, merged weights, or parameters that FSDP1 or
            DeepSpeed keeps in flat buffers.
    """
    if not isinstance(model, nn.Module):
        raise ScaloraError(f"model is {named(model)}: give a PEFT model, as peft.get_peft_model makes it")
    refuse_flattened(model)
    found: list[AdapterLayer] = []
    foreign: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for wrapper in WRAPPERS:
                name = name.replace(wrapper, "")
            name = name.removeprefix("module.")  # DistributedDataParallel's
            found += [AdapterLayer(name, module, adapter) for adapter in trained_adapters(module)]
        elif isinstance(module, BaseTunerLayer):
            foreign.add(type(module).__name__)
    if not found:
        raise ScaloraError(f"model {type(model).__name__} has no trainable LoRA layer: " + _why_none(model, foreign))
    adapters = sorted({layer.adapter for layer in found})
    if len(adapters) > 1:
        raise ScaloraError(
            f"adapters {', '.join(adapters)} are all being trained: make one active with model.set_adapter(name)"
        )
    shared = sharing([(layer.module, layer.adapter) for layer in found])
    why = {layer: _why_not(layer, twice) for layer, twice in zip(found, shared, strict=True)}
    return [layer for layer in found if not why[layer]], {layer: reason for layer, reason in why.items() if reason}


def _why_not(layer: AdapterLayer, shared: bool) -> str:
    if layer.module.merged:
        raise ScaloraError(f"layer {layer.name} is merged into its base weight: call model.unmerge_adapter() first")
    if problem := why_inexact(layer.module, layer.adapter):
        return problem
    if not (layer.A.requires_grad and layer.Bt.requires_grad):
        return "trains only one of its two adapter matrices: ScaLoRA needs both"
    return "shares its adapter with another layer: give each its own adapter" if shared else ""


def _why_none(model: nn.Module, foreign: set[str]) -> str:
    lora = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(module.disable_adapters for module in lora):
        return "its adapters are disabled; attach outside of model.disable_adapter()"
    if names := sorted({name for module in lora for name in (*module.lora_A, *module.lora_embedding_A)}):
        return (
            f"adapter {', '.join(map(repr, names))} is frozen or not active; call model.set_adapter(name), or load it "
            "with is_trainable=True"
        )
    found = f"it has {', '.join(sorted(foreign))} layers" if foreign else "it has no PEFT layers"
    return f"{found}; wrap it with peft.get_peft_model(model, LoraConfig(...)) first"


def is_dense(layer: AdapterLayer) -> bool:
    """Whether the base weight is an ordinary floating-point matrix that can be added to."""
    base: Any = layer.base
    bare = isinstance(layer.module, ParamWrapper)
    weight, cls = layer.weight if bare else getattr(base, "weight", None), plain_class(base)
    ordinary = bare or cls in (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)
    if not ordinary or not isinstance(weight, Tensor):
        return False
    if cls in CONVOLUTIONS:
        patches: Any = layer.module.lora_A[layer.adapter]  # PEFT gives it neither padding mode nor dilation of the base
        alike = (base.padding_mode, base.dilation) == (patches.padding_mode, patches.dilation)
        if not (alike and weight.is_contiguous()):
            return False
    return is_plain(weight)


def tied_weights(model: nn.Module, layers: list[AdapterLayer]) -> list[AdapterLayer]:
    """Layers whose base weight serves elsewhere in the model too (tied embeddings)."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return [layer for layer in layers if owners[id(layer.weight)] > 1]


def find_peft_model(model: nn.Module, layers: Sequence[AdapterLayer]) -> PeftModel:
    """The PeftModel of these layers, inside compile's, DDP's and other wrappers, or beside a reference.

    Raises:
        ScaloraError: there is none, or there are several.
    """
    for module in model.modules():
        if isinstance(module, PeftModel) and (own := {*module.modules()} & {layer.module for layer in layers}):
            others = [layer.name for layer in layers if layer.module not in own]
            if others:
                raise ScaloraError(
                    f"model is a {type(model).__name__} of several PEFT models, of which one adapter cannot hold all "
                    f"(layer {others[0]} is not in the first): save each by itself"
                )
            return module
    raise ScaloraError(
        f"model is a {type(model).__name__} without a PeftModel in it, which save_plain_lora needs: wrap it with "
        "peft.get_peft_model(model, LoraConfig(...)), or call its own save_pretrained where it made the adapter itself"
    )


def changes_base(init: bool | str) -> bool:
    """Whether PEFT has taken the initial adapter out of the base weights."""
    return isinstance(init, str) and init.lower().split("_niter_")[0] in ("pissa", "olora", "corda", "loftq", "lora_ga")
