"""A layer's state dict: trained and accumulated columns as the two matrices of one LoRA, in writing and in loading."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..common.errors import ScaloraError
from .accumulated import Accumulated
from .layout import as_columns, as_rows, experts, grown, like_lora_a, like_lora_b, lora_a, lora_b, matrix_keys
from .sharding import copy_into, gather_full, is_sharded
from .written_base import WrittenBase, loads_whole


class JoinedState(WrittenBase):
    """A LoRA layer that carries accumulated columns for its adapters, and writes and loads all as one."""

    accumulated: nn.ModuleDict  # an Accumulated by the name of its adapter

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, in PEFT's shapes."""
        return lora_a(self, adapter), lora_b(self, adapter)

    def held(self, adapter: str) -> Accumulated | None:
        # Whoever puts the state dict's matrices in place of the parameters has put in all columns already.
        if adapter not in self.accumulated or not self.as_made(adapter):
            return None
        held = self.accumulated[adapter]
        assert isinstance(held, Accumulated)
        return held if torch.compiler.is_compiling() or held.used else None

    def as_made(self, adapter: str) -> bool:
        """Whether PEFT's two matrices are as many columns as the adapter trains."""
        return self.matrices(adapter)[0].shape[0] == self.r[adapter] * experts(self)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As torch's, but lora_A is (r + k)×n and lora_B m×(r + k): first what is trained, then what is accumulated.

        On a written base a column more follows, which adds nothing (ones in A, zeros in B): without these base weights
        nobody, PEFT or we, shall take it for the whole.
        """
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for adapter in self.r if self.base_written else ():
            for dim, key in enumerate(matrix_keys(self, adapter)):
                value, form = state[prefix + key].detach(), (as_rows, as_columns)[dim]
                if not is_sharded(value):
                    mark = torch.full_like(form(value, experts(self)).narrow(dim, 0, 1), 1 - dim)
                    state[prefix + key] = grown(value, mark, dim, experts(self))
        for adapter in self.accumulated:
            if (held := self.held(adapter)) is None:
                continue
            if is_sharded(held.P):
                continue  # its columns are entries of their own
            P, Qt = held.columns()
            for dim, (key, more) in enumerate(zip(matrix_keys(self, adapter), (Qt, P), strict=True)):
                state[prefix + key] = grown(state[prefix + key].detach(), more, dim, experts(self))
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # pyright: ignore
        for adapter in self.r:
            self._split(state_dict, adapter, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def base_key(self) -> str:
        """What the base weight is called in the layer's state dict."""
        steps, inner = 1, self.base_layer
        while isinstance(inner, ParamWrapper):  # those of one module stand in one another
            steps, inner = steps + 1, inner.base_layer
        return "base_layer." * steps + getattr(self, "parameter_name", "weight")

    def _split(self, state_dict: dict[str, Any], adapter: str, prefix: str) -> None:
        """Leave the first r columns to PEFT's two matrices; hold the others, of which there may be none."""
        key_A, key_B = (prefix + key for key in matrix_keys(self, adapter))
        A, B = state_dict.get(key_A), state_dict.get(key_B)
        r, mine, count = self.r[adapter], self.matrices(adapter), experts(self)
        if f"{prefix}accumulated.{adapter}.P" in state_dict:
            return  # of a sharded model
        if A is None or B is None or A.ndim != mine[0].ndim or B.ndim != mine[1].ndim:
            return  # torch says what is wrong with it
        if A.shape[0] != B.shape[1] or A.shape[0] < r * count or A.shape[0] % count:
            return
        if A.shape[1:] != mine[0].shape[1:] or (B.shape[0], *B.shape[2:]) != (mine[1].shape[0], *mine[1].shape[2:]):
            return
        part = prefix + self.base_key() not in state_dict  # of a model's state
        if (
            part
            and A.shape[0] == r * count
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
        A, B = as_rows(A, count), as_columns(B, count)
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
            held.put(B[:, r:], A[r:])
        elif A[r:].any() and B[:, r:].any():
            return  # columns that have no place here
        own = like_lora_a(A[:r], mine[0], count), like_lora_b(B[:, :r], mine[1], count)
        for key, parameter, value in ((key_A, mine[0], own[0]), (key_B, mine[1], own[1])):
            if is_sharded(parameter):  # torch would not copy a whole tensor into it
                copy_into([parameter], [value])
                value = parameter
            state_dict[key] = value if value is parameter else value.clone()
