"""One method on a model of its own, driven as Trainer would drive it, with a clock on its steps and events."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from scalora.engine.event import ScaLora
from scalora.engine.stores.adapter import SLOTS, AdapterStore
from scalora.engine.white.moments import EVERY
from scalora.layers import kept_sum
from scalora.layers.hira_forward import HiraForward
from scalora.layers.lora_forward import LoraForward
from scalora.methods import MethodSpec, build_method
from scalora.models.heads import Head
from scalora.models.load import load_model

from .clock import now

OPTIONS: dict[str, dict[str, Any]] = {"base": {"accumulate": "base"}, "kept": {"keep_sums": True}}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.float32, "bf16-base": torch.bfloat16}  # of the base
_MEASURED_EVENTS = 3 * SLOTS


class Runner:
    """One method on a model of its own, which is adapted in place and driven as Trainer would drive it."""

    def __init__(self, name: str, model: PreTrainedModel, head: Head, rank: int, precision: str) -> None:
        device = model.device.type
        method, _, option = name.partition(":")
        method, _, larger = method.partition("@")
        r = rank * (4 if larger else 1)
        spec = MethodSpec(name=method, rank=r, options=OPTIONS.get(option, {}))
        torch.manual_seed(0)
        self.adapted = build_method(spec).adapt(model.train(), head)  # pyright: ignore[reportArgumentType]
        self.model = self.adapted.model
        if option == "peft":  # as PEFT computes it
            ours = [module for module in self.model.modules() if isinstance(module, (LoraForward, HiraForward))]
            for module in ours:
                _, module.__class__ = type(module).__bases__  # undoes `adopt`
            assert ours, f"{name}: there is no layer to give back to PEFT"
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.arguments = TrainingArguments(output_dir="unused", learning_rate=1e-4, use_cpu=device == "cpu")
        own = self.adapted.optimizer
        self.optimizer = own(self.arguments) if own else torch.optim.AdamW(self.trained, lr=1e-4)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
        self.state, self.control = TrainerState(max_steps=10_000), TrainerControl()
        self._tell("on_train_begin")
        handles = [getattr(callback, "handle", None) for callback in self.adapted.callbacks]
        self.handle: ScaLora | None = next(filter(None, handles), None)
        self.events: list[float] = []  # seconds of each
        self.looks: list[float] = []  # of each step that looked at second moments
        self.sums: list[float] = []  # in each step that formed the sums which layers keep
        if self.handle is not None:
            self.handle.rescale = self._timed(self.handle.rescale)
            if self.handle.refresh is not None:
                self.handle.refresh.refresh = self._timed(self.handle.refresh.refresh)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        self.backward(batch)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self._tell("on_step_end")

    def backward(self, batch: dict[str, torch.Tensor]) -> None:
        with self.autocast:
            loss = self.model(**batch).loss
        loss.backward()

    def seconds(self, batch: dict[str, torch.Tensor]) -> float:
        """Of one step that does not look, without the event in it."""
        while self._looking:
            self.looks.append(self._seconds(batch))
        return self._seconds(batch)

    def _seconds(self, batch: dict[str, torch.Tensor]) -> float:
        already, started = sum(self.events), now()
        with _forming() as formed:
            self.step(batch)
        if formed:
            self.sums.append(sum(formed))
        return now() - started - (sum(self.events) - already) - sum(formed)

    @property
    def _looking(self) -> bool:
        return self.handle is not None and self.handle.white is not None and self.handle.white.moments.looking

    def settle(self, batch: dict[str, torch.Tensor]) -> None:
        """Bring the store to where it is on average over a long run."""
        self.step(batch)
        if self.handle is None or not isinstance(store := self.handle.store, AdapterStore):
            return
        if self.handle.config.interval is None:  # a refresh cannot be taken at will: zeros cost as much to multiply
            for layer in store.layers:
                layer.accumulated.used = layer.accumulated.room - SLOTS // 2 * layer.rank
            return
        layer = self.handle.layers[0]
        slots = layer.accumulated.room // layer.rank + SLOTS // 2 + 1
        self.backward(batch)
        for _ in range(slots):
            self.handle.rescale()
        self.optimizer.zero_grad()

    def look_seconds(self, plain: float) -> float:
        """What looks add per step, where a step without one takes `plain` seconds."""
        return (sum(self.looks) / len(self.looks) - plain) / EVERY if self.looks else 0.0

    def sum_seconds(self, batch: dict[str, torch.Tensor] | None = None) -> float:
        """Mean seconds per step of forming the sums that layers keep, or of adding an event's columns to them.

        With a batch over all events from one recompression to the next, else over the steps that were timed.
        """
        kept = self.handle and self.handle.config.kept_sum
        if self.handle is None or not kept:
            return 0.0
        if batch is not None and self.handle.config.interval is not None:
            self.sums.clear()
            self.backward(batch)
            for _ in range(SLOTS):  # from one recompression to the next, whose sum is formed anew
                self.handle.rescale()
                with _forming() as formed, torch.no_grad(), self.autocast:
                    self.model(**batch)
                self.sums.append(sum(formed))
            self.optimizer.zero_grad()
        return sum(self.sums) / len(self.sums) / kept.steps if self.sums else 0.0

    def event_seconds(self, batch: dict[str, torch.Tensor]) -> float:
        """Mean seconds of an event per step."""
        if self.handle is None:
            return 0.0
        interval, refresh = self.handle.config.interval, self.handle.refresh
        if refresh is not None:
            return sum(self.events) / len(self.events) / refresh.every if self.events else math.nan
        if interval is None:
            return 0.0
        self.events.clear()
        self.backward(batch)
        for _ in range(_MEASURED_EVENTS):
            self.handle.rescale()
        self.optimizer.zero_grad()
        return sum(self.events) / len(self.events) / interval

    def _timed(self, function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            started = now()
            function(*args)
            self.events.append(now() - started)

        return run

    def _tell(self, event: str) -> None:
        for callback in self.adapted.callbacks:
            getattr(callback, event)(
                self.arguments, self.state, self.control, model=self.model, optimizer=self.optimizer
            )


@contextmanager
def _forming() -> Iterator[list[float]]:
    """The seconds of each sum that a layer forms within, to keep it."""
    found: list[float] = []
    make = kept_sum._next

    def timed(*arguments: Any) -> Any:
        started = now()
        result = make(*arguments)
        found.append(now() - started)
        return result

    with patch.object(kept_sum, "_next", timed):
        yield found


def load_runner(name: str, what: dict[str, Any], precision: str, device: str) -> Runner:
    """One method on a packaged model."""
    labels = 2 if what["head"] == "sequence-classification" else None
    model, _ = load_model(what["source"], head=what["head"], num_labels=labels)
    return Runner(name, model.to(device, PRECISIONS[precision]), what["head"], what["rank"], precision)  # pyright: ignore[reportArgumentType]


def make_batch(what: dict[str, Any], device: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20_000, (what["batch"], what["tokens"]), generator=generator)
    labels = ids if what["head"] == "causal-lm" else ids[:, 0] % 2
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "labels": labels.to(device)}
