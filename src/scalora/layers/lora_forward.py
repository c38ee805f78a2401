"""LoRA's forward pass without PEFT's detours: no copy of the input per adapter, no product and no sum of their own.

PEFT computes result + lora_B(lora_A(x.to(float32)))·s for one adapter after the other; under autocast the input is cast
there and back each time. Here all adapters together are two matrix products, the second of which adds to the result
instead of writing a product, a scaled product and a sum. Of the accumulated adapter only the columns in use take part,
and where there are many tokens, all are added to the weight instead (:mod:`scalora.layers.merged_linear`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .peft_lora import ACCUMULATED, AdapterLayer
from .products import Adapter, add_adapters, frozen_weight, merged_linear, pays
from .sharding import is_sharded


class Columns(NamedTuple):
    """How many columns of the accumulated adapter are not zero, and what its matrices were when that was known."""

    width: int
    seen: tuple[int, ...]


class FusedLinear(Linear):
    """PEFT's LoRA layer with a shorter forward pass where nothing but plain adapters is asked for."""

    probe: Adapter | None = None
    columns: Columns | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; whatever is out of the ordinary takes PEFT's own way."""
        adapters = None if args or kwargs else self._plain_adapters(x)
        probe = self.probe if torch.is_grad_enabled() else None
        if not adapters:
            result = super().forward(x, *args, **kwargs)
            return result if probe is None else add_adapters(result, x, [probe])
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # cast once, for base and adapters
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if probe is not None:
            adapters = [*adapters, probe]
        # Where all columns are trained, their own thin products are the cheaper way.
        frozen = any(not (each.Bt.requires_grad or each.A.requires_grad) for each in adapters)
        W = frozen_weight(self.base_layer, x) if frozen else None
        if W is not None and pays(x, W):
            return merged_linear(x, W, self.base_layer.bias, adapters)  # pyright: ignore
        return add_adapters(self.base_layer(x), x, adapters)

    def _plain_adapters(self, x: Tensor) -> list[Adapter] | None:
        """Each active adapter; None where the short way would not do the same."""
        if self.disable_adapters or self.merged or x.ndim < 2 or type(self.base_layer) not in (nn.Linear, Conv1D):
            return None
        found: list[Adapter] = []
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            lora_A, lora_B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            if name in self.lora_variant or _hooked(lora_A) or _hooked(lora_B):
                return None
            if not isinstance(dropout, nn.Identity) and self.training:
                return None
            Bt, A = lora_A.weight, lora_B.weight
            assert isinstance(Bt, Tensor)
            assert isinstance(A, Tensor)
            # Without autocast PEFT computes in the adapter's dtype, which may be wider than the input's.
            if is_sharded(Bt) or not (Bt.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
                return None
            if name == ACCUMULATED and self.columns is not None and not torch.compiler.is_compiling():
                # Whoever else wrote to it since (a checkpoint was loaded) may have filled more columns.
                width = self.columns.width if self.columns.seen == _seen(Bt, A) else Bt.shape[0]
                if width == 0:
                    continue
                Bt, A = Bt[:width], A[:, :width]
            found.append(Adapter(Bt, A, float(self.scaling[name])))
        return found


def fuse(module: nn.Module | LoraLayer) -> None:
    """Exchange the class of a LoRA layer that is PEFT's own for linear layers; of any other module nothing."""
    if type(module) is Linear:
        module.__class__ = FusedLinear


def fuse_lora(model: nn.Module) -> None:
    """Every LoRA layer of a PEFT model takes the short way where it can; trained, saved and merged as before."""
    for module in model.modules():
        fuse(module)


def declare_columns(layer: AdapterLayer, width: int) -> None:
    """All columns of the accumulated adapter from ``width`` on are zero, until it is written to again."""
    if isinstance(layer.module, FusedLinear):
        layer.module.columns = Columns(width, _seen(layer.Bt, layer.A))


def _seen(Bt: Tensor, A: Tensor) -> tuple[int, ...]:
    return Bt._version, A._version, Bt.data_ptr(), A.data_ptr()


def _hooked(module: nn.Module) -> bool:
    """Whether someone listens to a module's calls, or replaced it by more than a matrix."""
    return (
        type(module) is not nn.Linear
        or module.bias is not None
        or bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    )


class Probed(LoraLayer):
    """Put in front of a LoRA layer's class: the layer's own forward pass, and the probe's where there is one."""

    probe: Adapter | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return result if self.probe is None or not torch.is_grad_enabled() else add_adapters(result, x, [self.probe])


def make_probed(layer: AdapterLayer) -> None:
    """Let a layer take probes, by exchanging its module's class unless that knows them already."""
    cls = type(layer.module)
    if not hasattr(cls, "probe"):
        layer.module.__class__ = type(cls.__name__, (Probed, cls), {})
