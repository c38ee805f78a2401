"""Differences kept in a second, frozen LoRA adapter; the base weights are never written.

Per layer the adapter has ``capacity`` columns and room for a few events more. An event fills one slot of r columns;
when none is free, the sum is recompressed to ``capacity`` columns by a truncated SVD of its factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from ...algebra.lowrank import truncate
from ...common.errors import ScaloraError
from ...layers.lora_forward import LoraForward
from ...layers.peft_lora import ACCUMULATED, AdapterLayer, find_peft_model
from ...layers.sharding import copy_into, gather_full
from .peft_tuner import activate, pair
from .store import Move, Store, only_where

SLOTS = 4  # events from one recompression to the next


class AdapterStore(Store):
    """The accumulated adapter of a model; created on first use, taken over where it already exists."""

    def __init__(self, model: nn.Module, layers: Sequence[AdapterLayer], capacity: int | None) -> None:
        ensure_adapter(model, layers, capacity)
        self.layers = [layer.frozen() for layer in layers]
        ranks = [layer.rank for layer in layers]
        self.capacities = _capacities(layers, capacity)
        in_use = any(bool(A.any()) for layer in self.layers for A in gather_full([layer.A]))
        # All columns are free at first; of an adapter taken over any may be in use.
        self.free = 0 if in_use else min(layer.rank // r for layer, r in zip(self.layers, ranks, strict=True))
        device = layers[0].A.device
        self.settled = False  # whether the first columns are a recompression's
        self.discarded = torch.zeros(len(layers), device=device)  # squared norm lost so far, per layer
        self.total = torch.zeros(len(layers), device=device)  # squared norm at the last recompression
        self.ranks = ranks
        self._set_used_columns()

    def receive(self, moves: Sequence[Move], *, valid: Tensor | None = None, spare: int = 0) -> None:
        if self.free < 1:
            # A recompression waits for the device anyway, so it may ask whether there is anything to make room for.
            if valid is not None and not bool(valid):
                return
            self.recompress()
        for layers, A, d, B in moves:
            self._add(layers, only_where(valid, A), d, only_where(valid, B))
        self.free -= 1
        if self.free < spare:
            self.recompress()
        self._set_used_columns()

    def _add(self, layers: Sequence[AdapterLayer], A: Tensor, d: Tensor, B: Tensor) -> None:
        targets = [layer.frozen() for layer in layers]
        scaled, transposed = A.to(targets[0].A.dtype) * d[:, None, :].to(targets[0].A.dtype), B.mT
        start = targets[0].rank - self.free * layers[0].rank
        copy_into([t.A for t in targets], list(scaled), [(0, start)] * len(targets))
        copy_into([t.Bt for t in targets], list(transposed), [(start, 0)] * len(targets))

    def discarded_share(self, like: Tensor) -> Tensor:
        share = torch.where(self.total > 0, self.discarded / self.total, 0.0)
        return share.sqrt().mean().to(like)

    @torch.no_grad()
    def recompress(self) -> None:
        """Recompress every layer to its capacity; the slots past it are free again."""
        order = sorted(range(len(self.layers)), key=self._shape)
        for _, members in groupby(order, key=self._shape):
            index = list(members)
            factors = gather_full([self.layers[i].A for i in index] + [self.layers[i].Bt for i in index])
            P, Q = torch.stack(factors[: len(index)]), torch.stack(factors[len(index) :]).mT
            capacity = self.capacities[index[0]]
            # Rounded to half precision columns are no longer orthogonal; in float64 the saving would cost digits.
            settled = capacity if self.settled and P.dtype == torch.float32 else 0
            best = truncate(P, Q, capacity, settled=settled)
            pad = (0, P.shape[-1] - best.P.shape[-1])
            copy_into([self.layers[i].A for i in index], list(nn.functional.pad(best.P, pad)))
            copy_into([self.layers[i].Bt for i in index], list(nn.functional.pad(best.Q, pad).mT))
            self.discarded[index] += best.discarded.to(self.discarded)
            self.total[index] = best.total.to(self.total)
        self.free, self.settled = SLOTS, True
        self._set_used_columns()

    def _shape(self, i: int) -> tuple[int, ...]:
        return (*self.layers[i].A.shape, *self.layers[i].Bt.shape, self.capacities[i])

    def state_dict(self) -> dict[str, Any]:
        return {
            "free": self.free,
            "settled": self.settled,
            "discarded": self.discarded.clone(),
            "total": self.total.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.free, self.settled = int(state["free"]), bool(state["settled"])
        self.discarded.copy_(state["discarded"])
        self.total.copy_(state["total"])
        self._set_used_columns()

    def _set_used_columns(self) -> None:
        """Let the forward pass leave out the columns that are zero."""
        for layer, r in zip(self.layers, self.ranks, strict=True):
            if isinstance(layer.module, LoraForward):
                layer.module.used_columns = layer.rank - self.free * r


def ensure_adapter(model: nn.Module, layers: Sequence[AdapterLayer], capacity: int | None, slots: int = SLOTS) -> None:
    """Add the accumulated adapter, all zero, unless the model has one already; make it active and frozen.

    It has ``capacity`` columns and ``slots`` times r more; without slots it holds one constant update.

    Raises:
        ScaloraError: the model has one of another rank, or of another trained adapter.
    """
    peft_model = find_peft_model(model)
    pair(peft_model, layers[0].adapter)
    widths = [k + slots * layer.rank for k, layer in zip(_capacities(layers, capacity), layers, strict=True)]
    if ACCUMULATED not in peft_model.peft_config:
        trained = peft_model.peft_config[layers[0].adapter]
        assert isinstance(trained, LoraConfig)
        config = _plain_config(trained, dict(zip(_module_names(layers), widths, strict=True)))
        # What PEFT draws, on the CPU, is overwritten; dropout and the order of the data stay those of plain LoRA.
        with torch.random.fork_rng(devices=[]):
            # PeftModelForSequenceClassification's own add_adapter would give this adapter a second classifier.
            PeftModel.add_adapter(peft_model, ACCUMULATED, config)
        for layer in layers:
            nn.init.zeros_(layer.frozen().A)
            nn.init.zeros_(layer.frozen().Bt)
    for layer, width in zip(layers, widths, strict=True):
        found = layer.frozen().rank if ACCUMULATED in layer.module.lora_A else None
        if found != width:
            raise ScaloraError(
                f"layer {layer.name} has an accumulated adapter of rank {found}, but this configuration needs {width}: "
                "continue with the rank and capacity it was trained with, or join the adapters before starting anew"
            )
    activate(model)


def _capacities(layers: Sequence[AdapterLayer], capacity: int | None) -> list[int]:
    return [capacity or 8 * layer.rank for layer in layers]


def _plain_config(trained: LoraConfig, widths: dict[str, int]) -> LoraConfig:
    """A plain LoRA config with scale 1 and these ranks, on the trained adapter's modules."""
    common = max(widths.values(), key=list(widths.values()).count)
    others = {name: width for name, width in widths.items() if width != common}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=trained.target_modules,
        exclude_modules=trained.exclude_modules,
        layers_to_transform=trained.layers_to_transform,
        layers_pattern=trained.layers_pattern,
        fan_in_fan_out=trained.fan_in_fan_out,
        task_type=trained.task_type,
        base_model_name_or_path=trained.base_model_name_or_path,
    )


def _module_names(layers: Iterable[AdapterLayer]) -> list[str]:
    """Names as PEFT matches them: relative to the model that was wrapped."""
    return [layer.name.split("base_model.model.", 1)[-1] for layer in layers]
