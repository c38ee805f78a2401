"""What stands in for PEFT's LoRA layer while ScaLoRA trains it: to PEFT one plain adapter, whatever it is asked for.

The layer computes with all columns, trained and accumulated. Its state dict holds both as the two matrices of one LoRA
of more columns, and splits such matrices when it loads them. Merging, mixed batches and averages go the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

from ..common.errors import ScaloraError
from .accumulated import Accumulated
from .adopt import adopt
from .layout import as_matrix, grown, in_weight_layout, lora_a, lora_b, matrix_keys, thin_pass
from .sharding import copy_into, gather_full, is_sharded
from .watched import Watched, watch
from .written_base import WrittenBase, loads_whole


class StandIn(WrittenBase):
    """A LoRA layer of any of PEFT's classes that carries accumulated columns for its adapters."""

    accumulated: nn.ModuleDict  # an Accumulated by the name of its adapter
    called = False  # with gradients to come, since the last optimizer step
    first = False  # of the model's layers
    attached = False  # to an optimizer, which writes to the matrices
    torn = False  # while an event writes, and after one that did not come to its end
    copied = False  # from a layer that may move columns while this one does not
    watched: dict[str, Watched | None] | None = None  # matrices as they were, until they are trained or loaded

    @property
    def other_param_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (*super().other_param_names, "accumulated")  # so that PEFT deletes it with its adapter

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, in PEFT's shapes."""
        return lora_a(self, adapter), lora_b(self, adapter)

    def held(self, adapter: str) -> Accumulated | None:
        # Whoever puts the state dict's matrices in place of the parameters has put in all columns already.
        if adapter not in self.accumulated or self.matrices(adapter)[0].shape[0] != self.r[adapter]:
            return None
        held = self.accumulated[adapter]
        assert isinstance(held, Accumulated)
        return held if torch.compiler.is_compiling() or held.used else None

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
        if self.disable_adapters or self.merged or isinstance(self, MultiheadAttention):
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
        P, Qt = held.columns()
        wide = torch.promote_types(P.dtype, torch.float32)
        more = (P.to(wide) @ Qt.to(wide)) * self.scaling[adapter]
        return (delta.to(wide) + in_weight_layout(self, adapter, more)).to(delta.dtype)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As torch's, but lora_A is (r + k)×n and lora_B m×(r + k): first what is trained, then what is accumulated.

        On a written base a column more follows, which adds nothing (ones in A, zeros in B): without these base weights
        nobody, PEFT or we, shall take it for the whole.
        """
        if self.torn:
            self.refuse_averages()
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for adapter in self.r if self.base_written else ():
            for dim, key in enumerate(matrix_keys(self, adapter)):
                value = state[prefix + key].detach()
                if not is_sharded(value):
                    mark = value.narrow(dim, 0, 1).new_full((), 1 - dim).expand_as(value.narrow(dim, 0, 1))
                    state[prefix + key] = torch.cat([value, mark], dim)
        for adapter in self.accumulated:
            if (held := self.held(adapter)) is None:
                continue
            self.refuse_averages()
            if is_sharded(held.P):
                continue  # its columns are entries of their own
            P, Qt = held.columns()
            for dim, (key, more) in enumerate(zip(matrix_keys(self, adapter), (Qt, P), strict=True)):
                state[prefix + key] = grown(state[prefix + key].detach(), more, dim)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # pyright: ignore
        for adapter in self.r:
            self._split(state_dict, adapter, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.watched = None if self.watched is None else {}  # what is loaded into a copy is its own
        self.torn = self.torn and self.base_written and f"{prefix}base_layer.weight" not in state_dict

    def _split(self, state_dict: dict[str, Any], adapter: str, prefix: str) -> None:
        """Leave the first r columns to PEFT's two matrices; hold the others, of which there may be none."""
        key_A, key_B = (prefix + key for key in matrix_keys(self, adapter))
        A, B = state_dict.get(key_A), state_dict.get(key_B)
        r, mine = self.r[adapter], self.matrices(adapter)
        if f"{prefix}accumulated.{adapter}.P" in state_dict:
            return  # of a sharded model
        if A is None or B is None or A.ndim != mine[0].ndim or B.ndim != mine[1].ndim:
            return  # torch says what is wrong with it
        if A.shape[0] != B.shape[1] or A.shape[0] < r:
            return
        if A.shape[1:] != mine[0].shape[1:] or (B.shape[0], *B.shape[2:]) != (mine[1].shape[0], *mine[1].shape[2:]):
            return
        part = f"{prefix}base_layer.weight" not in state_dict  # of a model's state
        if (
            part
            and A.shape[0] == r
            and (self.held(adapter) is not None or self.base_written)
            and not loads_whole()
            and not is_sharded(mine[0])  # FSDP2 loads what is trained and what is not one after the other
        ):
            raise ScaloraError(
                f"{key_A} has the {r} trained columns only, but what was moved out of them is in the model: if they "
                "are a snapshot of it, keep and load the whole model.state_dict(); if they are another adapter, load "
                "its folder with load_adapter, or delete this one first"
            )
        A, B = (gather_full([t])[0] for t in (A, B))
        if A.shape[0] == r + 1 and bool((A[r] == 1).all()) and not B[:, r].any():  # it comes from a written base
            if part and not loads_whole() and not is_sharded(mine[0]):
                raise ScaloraError(
                    f"{key_A} is the adapter alone of a model whose base weights hold what accumulate='base' has moved "
                    "there: load that model's whole state_dict(), or its checkpoint"
                )
            self.mark_written()
            A, B = A[:r], B[:, :r]
        held = dict(self.accumulated.items()).get(adapter)
        if isinstance(held, Accumulated):
            held.put(as_matrix(B[:, r:]), as_matrix(A[r:]))
        elif A[r:].any() and B[:, r:].any():
            return  # columns that have no place here
        for key, parameter, value in ((key_A, mine[0], A[:r]), (key_B, mine[1], B[:, :r])):
            if is_sharded(parameter):  # torch would not copy a whole tensor into it
                copy_into([parameter], [value])
                value = parameter
            state_dict[key] = value if value is parameter else value.clone()

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
        """Refuse to compute with matrices that were written to half-way, in a copy, or past the optimizer."""
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
                raise ScaloraError(
                    f"the matrices of adapter {adapter!r} were written to, in a copy or past the attached optimizer, "
                    "as averages of weights, hotswap and other optimizers do: events change the columns of A and B, so "
                    "that means and snapshots of them have no meaning; average the merged weights, keep and load "
                    "whole state dicts, and detach() before another optimizer trains on"
                )

    def _now(self, adapter: str) -> Watched | None:
        held = self.accumulated[adapter]
        matrices: list[Any] = [*self.matrices(adapter), held.P, held.Qt]
        if matrices[0].shape[0] != self.r[adapter] or any(t.is_meta or is_sharded(t) for t in matrices):
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
