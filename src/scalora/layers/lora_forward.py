"""LoRA's forward pass without PEFT's detours: no copy of the input per adapter, no product and no sum of their own.

PEFT computes result + lora_B(lora_A(x.to(float32)))·s for one adapter after the other; under autocast the input is cast
there and back each time. Here all adapters together are two matrix products, the second of which adds to the result
instead of writing a product, a scaled product and a sum. Of what is accumulated only the columns in use take part. In
training they are part of the weight that is multiplied with (:mod:`.kept_sum`); elsewhere all are added to the weight
where there are many tokens (:mod:`.products`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.lora import Conv2d, Embedding, Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.errors import ScaloraError, named
from .accumulated import Accumulated
from .adopt import adopt
from .gradient_sketch import GradientSketch, gather_sketch
from .kept_sum import KeptSum
from .moment_sketch import MomentSketch, gather_moments
from .products import Adapter, add_adapters, frozen_weight, merged_linear, merging_is_cheaper
from .reading import reading
from .sharding import is_sharded

_HALF = (torch.bfloat16, torch.float16)


class LoraForward(nn.Module, LoraLayer):
    """Stands in for PEFT's LoRA layers: a shorter forward pass of plain linear ones, sketches of any's gradient."""

    sketch: GradientSketch | None = None
    moments: MomentSketch | None = None
    kept_sum: KeptSum | None = None
    # Whether PEFT's pass, behind ours, is that of linear layers; or one of several that we know. Settled for the class,
    # since torch.compile would break its graph over the question.
    is_linear: ClassVar[bool] = False
    is_known: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        behind = cls.__mro__[cls.__mro__.index(LoraForward) + 1 :]
        inherited = next(vars(base)["forward"] for base in behind if "forward" in vars(base))
        cls.is_linear = inherited is Linear.forward
        cls.is_known = inherited in (Linear.forward, Embedding.forward, Conv2d.forward)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; whatever is out of the ordinary takes PEFT's own way."""
        adapters = None if args or kwargs else self._plain_adapters(x)
        if adapters:
            if (
                torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
            ):  # cast once, for base and adapters
                x = x.to(torch.get_autocast_dtype(x.device.type))
            result = self._short(x, adapters)
        else:
            result = self.peft_forward(x, *args, **kwargs)
        if torch.is_grad_enabled():
            if self.sketch is not None:
                result = gather_sketch(result, x, self.sketch, reading(self))
            if self.moments is not None:
                result = gather_moments(result, x, self.moments, reading(self))
        return result

    def train(self, mode: bool = True) -> Any:
        """As torch's; what is kept for training is given back for evaluation."""
        if self.kept_sum is not None and not mode:
            self.kept_sum.drop()
        return super().train(mode)

    @property
    def _kept_sum(self) -> KeptSum | None:
        """What this pass may keep for the next; without gradients too, as reentrant checkpoints begin."""
        apart = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()  # autograd takes nothing made there
        return self.kept_sum if self.training and not apart else None

    def peft_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own pass."""
        return super().forward(x, *args, **kwargs)

    def _short(self, x: Tensor, adapters: list[Adapter]) -> Tensor:
        # Where all columns are trained, their own thin products are the cheaper way.
        frozen, trained = [], []
        for each in adapters:
            (trained if each.lora_A.requires_grad or each.lora_B.requires_grad else frozen).append(each)
        kept = self._kept_sum
        W = frozen_weight(self.base_layer, x, half=kept is not None and kept.half) if frozen else None
        bias: Any = self.base_layer.bias
        if W is not None and kept is not None and kept.pays(x, W):
            result, adapters = nn.functional.linear(x, kept.of(W, frozen, x), bias), trained
            if not trained:
                return result
        elif W is not None and W.dtype.itemsize >= 4 and merging_is_cheaper(x, W):
            return merged_linear(x, W, bias, adapters)
        else:
            result = self.base_layer(x)
        if torch.is_autocast_enabled(x.device.type):
            return add_adapters(result, x, adapters)
        # As PEFT: in the adapter's dtype, and rounded once.
        return add_adapters(result, x, adapters, torch.promote_types(result.dtype, adapters[0].lora_A.dtype))

    def _plain_adapters(self, x: Tensor) -> list[Adapter] | None:
        """Each active adapter; None where the short way would not do the same."""
        if not self.is_linear:
            return None
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
            A, B = lora_A.weight, lora_B.weight
            assert isinstance(A, Tensor)
            assert isinstance(B, Tensor)
            if is_sharded(A) or not (torch.is_autocast_enabled(x.device.type) or self._in_their_dtype(x, A)):
                return None
            if found and A.dtype != found[0].lora_A.dtype:
                return None
            scale = float(self.scaling[name])
            found.append(Adapter(A, B, scale))
            if (held := self.held(name)) is not None:
                P, Qt = held.live()
                # A compiled pass keeps nothing, and would be compiled anew for each growth.
                growth = None if torch.compiler.is_compiling() else held.growth
                found.append(Adapter(Qt, P, scale, growth))
        return found

    def _in_their_dtype(self, x: Tensor, lora_A: Tensor) -> bool:
        """Whether it computes in lora_A's dtype without autocast: the input's, or a wider one on a base in half."""
        if lora_A.dtype == x.dtype:
            return True
        base: Any = self.base_layer
        casts = getattr(self, "cast_input_dtype_enabled", True)  # PEFT's disable_input_dtype_casting
        return casts and x.dtype in _HALF and base.weight.dtype == x.dtype and lora_A.dtype.itemsize >= 4

    def held(self, adapter: str) -> Accumulated | None:
        """What has been moved out of an adapter and belongs to its function; None where there is nothing."""
        return None


def shorten(module: nn.Module) -> None:
    """Give a LoRA layer that is PEFT's own for linear layers the shorter forward pass; any other module nothing."""
    if type(module) is Linear:
        adopt(module, LoraForward)


def fuse_lora(model: nn.Module) -> None:
    """Every LoRA layer of a PEFT model takes the short way where it can; trained, saved and merged as before.

    Args:
        model: what ``get_peft_model`` returned; changed in place. Layers that are not plain LoRA stay as they are.

    Raises:
        ScaloraError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise ScaloraError(f"model is {named(model)}: give a PEFT model, as peft.get_peft_model makes it")
    for module in model.modules():
        shorten(module)


def _hooked(module: nn.Module) -> bool:
    """Whether someone listens to a module's calls, or replaced it by more than a matrix."""
    return (
        type(module) is not nn.Linear
        or module.bias is not None
        or "forward" in vars(module)  # accelerate's hooks, which bring a weight from where it lies
        or bool(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
    )
