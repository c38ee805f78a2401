"""A whole training step of each method beside plain PEFT LoRA: one process, turns in changing order, medians.

    python -m benchmarks.cost.overhead --model smollm2 --precision bf16 --repeats 12

Writes OUTPUT/MODEL-PRECISION.json. A step is forward, backward, clipping and AdamW; ScaLoRA's events are timed apart,
as a mean that holds its share of recompressions, and added over the interval. Its store is in its steady state. Steps
that look at second moments are timed apart too, and what they take more is added over the steps between them. On a CPU
it is the processor time of one thread (:mod:`benchmarks.cost.clock`). Peak memory is that of three steps in a process
of its own, above what the imports take.
"""

from __future__ import annotations

import math
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from scalora.common import environment as provenance
from scalora.engine.event import ScaLora
from scalora.engine.stores.adapter import SLOTS, AdapterStore
from scalora.engine.white.moments import EVERY
from scalora.layers.hira_forward import HiraForward
from scalora.layers.lora_forward import LoraForward
from scalora.methods import MethodSpec, build_method
from scalora.models.heads import Head
from scalora.models.load import load_model

from .. import record
from .clock import described, now, one_thread

MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {"source": "smollm2-135m-instruct", "head": "causal-lm", "batch": 8, "tokens": 128, "rank": 8},
    "minilm": {"source": "minilm-l6-v2", "head": "sequence-classification", "batch": 16, "tokens": 64, "rank": 8},
    "minilm-short": {"source": "minilm-l6-v2", "head": "sequence-classification", "batch": 16, "tokens": 24, "rank": 8},
}
REFERENCE = "lora:peft"
METHODS = (
    REFERENCE,
    "lora",
    "scalora",
    "scalora-i",
    "white-lora",
    "white-scalora",
    "scalora:base",
    "scalora-i:base",
    "scalora-refresh",
    "scalora-refresh:base",
    "relora",
    "mora",
    "hira",
    "hira:peft",
    "dora",
    "lora@4r",
    "full",
)
_MEASURED_EVENTS = 3 * SLOTS


class Runner:
    """One method on a model of its own, which is adapted in place and driven as Trainer would drive it."""

    def __init__(self, name: str, model: PreTrainedModel, head: Head, rank: int, precision: str) -> None:
        device = model.device.type
        method, _, option = name.partition(":")
        method, _, larger = method.partition("@")
        r = rank * (4 if larger else 1)
        spec = MethodSpec(name=method, rank=r, options={"accumulate": option} if option == "base" else {})
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
        self.step(batch)
        return now() - started - (sum(self.events) - already)

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


def load_runner(name: str, what: dict[str, Any], precision: str, device: str) -> Runner:
    """One method on a packaged model."""
    labels = 2 if what["head"] == "sequence-classification" else None
    model, _ = load_model(what["source"], head=what["head"], num_labels=labels)
    return Runner(name, model.to(device), what["head"], what["rank"], precision)  # pyright: ignore[reportArgumentType]


def make_batch(what: dict[str, Any], device: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20_000, (what["batch"], what["tokens"]), generator=generator)
    labels = ids if what["head"] == "causal-lm" else ids[:, 0] % 2
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "labels": labels.to(device)}


def measure(
    runners: dict[str, Runner], what: dict[str, Any], device: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of a step of each method, one number a round, and of its events per step."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    order, chance = list(runners), random.Random(0)
    for runner in runners.values():
        runner.settle(make_batch(what, device, 0))
    for turn in range(rounds):
        chance.shuffle(order)
        batch = make_batch(what, device, turn)
        for name in order:
            seconds[name].append(runners[name].seconds(batch))
    for runner in runners.values():
        while runner.handle is not None and runner.handle.refresh is not None and not runner.events:
            runner.step(make_batch(what, device, 0))  # until a refresh has been seen
    batch = make_batch(what, device, 0)
    shares = {
        name: runner.event_seconds(batch) + runner.look_seconds(median(seconds[name]))
        for name, runner in runners.items()
    }
    return seconds, shares


def compared(values: list[float], reference: list[float], events: float) -> dict[str, Any]:
    """A method's steps beside those of the reference in the same rounds; ``events``: seconds more per step."""
    share = events / median(reference)
    ratios = sorted(value / base + share for value, base in zip(values, reference, strict=True))
    return {
        "seconds": values,
        "event_seconds_per_step": events,
        "median": median(values) + events,
        "ratio": median(ratios),
        "quartiles": (ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]),
    }


def peak_memory(name: str, what: dict[str, Any], precision: str, device: str) -> int:
    """Bytes at the peak of three steps, above what the imports take; on a CPU the process's resident memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_memory, name, what, precision, device).result()


def _peak_memory(name: str, what: dict[str, Any], precision: str, device: str) -> int:
    before = provenance.peak_memory() if device == "cpu" else 0
    runner, batch = load_runner(name, what, precision, device), make_batch(what, device, 0)
    for _ in range(3):
        runner.step(batch)
    return provenance.peak_memory() - before


def main() -> None:
    parser = record.parser(__doc__, "overhead")
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=8, help="steps of each method that are timed")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # pyright: ignore
    one_thread()
    what = MODELS[options.model]
    names = options.methods.split(",")
    if REFERENCE not in names:
        parser.error(f"--methods {options.methods}: {REFERENCE} must be among them, all others are measured against it")
    memory = {name: peak_memory(name, what, options.precision, device) for name in names}
    runners = {name: load_runner(name, what, options.precision, device) for name in names}
    seconds, events = measure(runners, what, device, options.repeats)
    reference = median(seconds[REFERENCE])
    table = Table("method", "s a step", "ratio to PEFT's", "quartiles", "events", "peak memory", "store's own")
    rows = {}
    for name, values in seconds.items():
        row = compared(values, seconds[REFERENCE], events[name]) | {
            "peak_memory_bytes": memory[name],
            "memory_ratio": memory[name] / memory[REFERENCE],
            "store_bytes": _store_bytes(runners[name].model),
        }
        rows[name] = row
        table.add_row(
            name, f"{row['median']:.4f}", f"{row['ratio']:.3f}", "{:.3f} – {:.3f}".format(*row["quartiles"]),
            f"{events[name] / reference:.3f}", f"{row['memory_ratio']:.3f}", f"{row['store_bytes'] / 2**20:.1f} MiB",
        )  # fmt: skip
    Console().print(table)
    content = {
        "clock": described(),
        **{key: what[key] for key in ("batch", "tokens", "rank")},
        "methods": rows,
    }
    record.write(options.output / f"{options.model}-{options.precision}.json", content)


def _store_bytes(model: nn.Module) -> int:
    """Of the accumulated columns."""
    return sum(p.nbytes for name, p in model.named_parameters() if ".accumulated." in name)


if __name__ == "__main__":
    main()
