"""What stands in for PEFT's LoRA layer while ScaLoRA trains it: to PEFT one plain adapter, whatever it is asked for.

The layer computes with all columns, trained and accumulated. Its state dict holds both as the two matrices of one LoRA
of more columns, and splits such matrices when it loads them. Merging, mixed batches and averages go the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from ..common.errors import ScaloraError
from .adopt import adopt
from .joined_state import JoinedState
from .layout import each_expert, experts, in_weight_layout, thin_pass
from .sharding import is_sharded
from .watched import Watched, watch

_REPLICA = (
    "layer {} runs in a copy of nn.DataParallel, which Trainer makes where it sees several GPUs; what a step leaves in "
    "its layers would be lost: start one process for each GPU (torchrun, accelerate launch), or show one "
    "(CUDA_VISIBLE_DEVICES=0)"
)


class StandIn(JoinedState):
    """A LoRA layer of any of PEFT's classes that carries accumulated columns for its adapters."""

    called = False  # with gradients to come, since the last optimizer step
    first = False  # of the model's layers
    attached = False  # to an optimizer, which writes to the matrices
    torn = False  # while an event writes, and after one that did not come to its end
    _is_replica = False  # which nn.DataParallel says of the copies of one pass
    copied = False  # from a layer that may move columns while this one does not
    watched: dict[str, Watched | None] | None = None  # matrices as they were, until they are trained or loaded

    @property
    def other_param_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (*super().other_param_names, "accumulated")  # so that PEFT deletes it with its adapter

    def widen(self, adapter: str, room: int) -> None:
        """Make room for so many accumulated columns of an adapter that has some room."""
        self.refuse_averages()
        self.accumulated[adapter].widen(room)  # pyright: ignore
        if self.watched is not None:
            self.watch()  # its tensors are others

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, with what has been accumulated."""
        if torch.is_grad_enabled():
            self.called = True
            if self._is_replica and self.attached:
                raise ScaloraError(_REPLICA.format(self.layer_name))
        if self.torn or (not (self.attached and torch.is_grad_enabled()) and self.watched is not None):
            self.refuse_averages()
        result = super().forward(x, *args, **kwargs)
        self._until_trained(result[0] if isinstance(result, tuple) else result)  # attention gives its weights too
        return result

    def peft_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own pass, and the accumulated columns beside it."""
        names = kwargs.get("adapter_names")
        if not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant) and self.is_known:
            return self._in_one_sum(x)
        result = super().peft_forward(x, *args, **kwargs)
        if self.disable_adapters or self.merged or isinstance(self, MultiheadAttention | ParamWrapper):
            return result  # nothing is asked for, or it is part of the weight
        for adapter in self.active_adapters if names is None else sorted(set(names)):
            if (held := self.held(adapter)) is None:
                continue
            rows = slice(None) if names is None else [i for i, name in enumerate(names) if name == adapter]
            P, Qt = held.live()
            more = (thin_pass(self, adapter, x[rows], P, Qt) * self.scaling[adapter]).to(result.dtype)
            result = result + more if names is None else result.index_add(0, torch.tensor(rows, device=x.device), more)
        return result

    def _in_one_sum(self, x: Tensor) -> Tensor:
        """PEFT's pass of a layer that we know, all columns added before the sum is rounded to half precision."""
        result = self.base_layer(x)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter not in self.r:
                continue
            A, B = self.matrices(adapter)
            if adapter in self.lora_A:
                x = self._cast_input_dtype(x, A.dtype)
                own = self.lora_B[adapter](self.lora_A[adapter](self.lora_dropout[adapter](x)))
            else:
                own = thin_pass(self, adapter, x, B, A)
            result = result + own * self.scaling[adapter]
            if (held := self.held(adapter)) is not None:
                result = result + thin_pass(self, adapter, x, *held.live()) * self.scaling[adapter]
        return result.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·(lora_B lora_A + P Qᵀ): what PEFT merges, subtracts and takes singular vectors of."""
        self.called = True  # attention layers compute with the merged weight
        self.refuse_averages()
        delta = super().get_delta_weight(adapter)
        self._until_trained(delta)
        if (held := self.held(adapter)) is None:
            return delta
        P, Qt = each_expert(*held.columns(), experts(self))
        wide = torch.promote_types(P.dtype, torch.float32)
        more = (P.to(wide) @ Qt.to(wide)) * self.scaling[adapter]
        return (delta.to(wide) + in_weight_layout(self, adapter, more)).to(delta.dtype)

    def get_delta_factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """As PEFT's of experts, (E, …, r + k) and (E, r + k, …): what their weights are summed with in a pass."""
        first, last, scale = super().get_delta_factors(adapter)  # pyright: ignore[reportAttributeAccessIssue]
        if (held := self.held(adapter)) is not None:
            P, Qt = each_expert(*held.live(), experts(self))
            more = (P, Qt) if self._did_swap_in_out_features else (Qt.mT, P.mT)
            first, last = torch.cat([first, more[0].to(first)], 2), torch.cat([last, more[1].to(last)], 1)
        return first, last, scale

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.torn or any(map(self.held, self.accumulated)):
            self.refuse_averages()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # pyright: ignore
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.watched = None if self.watched is None else {}  # what is loaded into a copy is its own
        self.torn = self.torn and self.base_written and prefix + self.base_key() not in state_dict

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; an adapter that is made anew has accumulated nothing."""
        if adapter_name in self.accumulated:
            del self.accumulated[adapter_name]
        super().update_layer(adapter_name, *args, **kwargs)
        (self.watched or {}).pop(adapter_name, None)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        (self.watched or {}).pop(adapter_name, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.called = False
        self.attached, self.copied = False, True
        former = self.watched or {}
        self.watch()  # from now on whoever writes to the copy's matrices is noticed
        for adapter, was in former.items():  # and whoever has written to the original's
            if self.watched and was is not None and (now := self.watched.get(adapter)) is not None:
                self.watched[adapter] = now._replace(sample=was.sample.to(now.sample.device))

    def watch(self) -> None:
        """From now on notice who writes to the matrices, until they are trained or loaded; a fresh original is free."""
        moved = {name for name, held in self.accumulated.items() if held.used or self.base_written or self.copied}
        self.watched = {name: self._now(name) for name in moved}

    def refuse_averages(self) -> None:
        """Refuse matrices that were written to half-way, in a copy or past the optimizer, or are no longer finite."""
        if self.torn:
            raise ScaloraError(
                f"layer {self.layer_name}: an error has stopped an event of ScaLoRA half-way, so that the adapter and "
                "what was moved out of it do not belong together: load a checkpoint, or model.load_state_dict() a state"
            )
        if torch.compiler.is_compiling():
            return
        if self.watched == {}:
            self.watch()
        for adapter, former in (self.watched or {}).items():
            now = self._now(adapter) if adapter in self.accumulated else None
            if now is not None and former is not None and not now.equals(former):
                self._refuse_diverged(adapter, now)
                raise ScaloraError(
                    f"the matrices of adapter {adapter!r} were written to, in a copy or past the attached optimizer, "
                    "as averages of weights, hotswap and other optimizers do: events change the columns of A and B, so "
                    "that means and snapshots of them have no meaning; average the merged weights, keep and load "
                    "whole state dicts, and detach() before another optimizer trains on"
                )

    def _refuse_diverged(self, adapter: str, now: Watched) -> None:
        """What is not finite equals nothing: nobody need have written to it."""
        if not now.is_finite:
            raise ScaloraError(
                f"layer {self.layer_name}: the matrices of adapter {adapter!r} are no longer finite: training has "
                "diverged; load a checkpoint or a state of before, and train on with a lower learning rate, or with "
                "gradients clipped"
            )

    def _now(self, adapter: str) -> Watched | None:
        held = self.accumulated[adapter]
        matrices: list[Any] = [*self.matrices(adapter), held.P, held.Qt]
        if not self.as_made(adapter) or any(t.is_meta or is_sharded(t) for t in matrices):
            return None
        return watch(matrices, values=self.first)  # comparing values waits for the device: one layer does so for all

    def _apply(self, *args: Any, **kwargs: Any) -> StandIn:
        """As torch's: to another device or dtype."""
        self.refuse_averages()
        super()._apply(*args, **kwargs)
        if self.watched is not None:
            self.watch()
        return self

    def _until_trained(self, result: Tensor) -> None:
        """A copy whose result a gradient reaches is being trained, as plain LoRA: it is watched no more."""
        if not self.attached and self.watched is not None and result.requires_grad:
            result.register_hook(self._trained)

    def _trained(self, gradient: Tensor) -> None:
        self.watched = None


def stand_in(module: LoraLayer) -> StandIn:
    """Let a LoRA layer of PEFT's carry accumulated columns; it has none yet.

    Raises:
        ScaloraError: someone has put a forward pass of his own into the layer.
    """
    assert isinstance(module, nn.Module)
    if isinstance(module, StandIn):
        return module
    own = vars(module).get("forward")
    adopted = adopt(module, StandIn)  # pyright: ignore[reportArgumentType]
    adopted.accumulated = nn.ModuleDict()
    adopted.torn = False  # of its own from the start: a compiled pass would be compiled again
    if own is not None:
        _reconnect(adopted)
    return adopted


def _reconnect(module: StandIn) -> None:
    """accelerate's hooks call the forward pass that the layer had when they came: let them call the present one."""
    former = vars(module).get("_old_forward")
    if getattr(former, "__self__", None) is not module or "_hf_hook" not in vars(module):
        raise ScaloraError(
            f"a {type(module).__name__} layer has a forward pass that was put into it, which ScaLoRA would not see: "
            "attach first, then patch the layer"
        )
    module._old_forward = type(module).forward.__get__(module)  # pyright: ignore
