"""A whole training step and its peak memory, beside PEFT's LoRA in the same process, in turns."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

from ..cost.overhead import REFERENCE, compared
from ..cost.runner import Runner
from .models import random_batch
from .rivals import Cell, Rivals, allocated, peak, reset_peak

ROUNDS = 5
LOOKS = 3


def measure(rivals: Rivals, cell: Cell) -> dict[str, Any]:
    """The row of each method; in `cell` only the tokens may differ from those that the rivals were made for.

    There is at least one round; more while there is time for them. Empty where PEFT's LoRA itself fails.
    """
    device, budget = rivals.device, rivals.budget
    step_bytes: dict[str, int] = {}
    for name, runner in rivals.runners.items():
        budget.ask()
        with rivals.failures.noting(cell, name):
            if rivals.checkpointing != cell.checkpointing:
                _checkpoint(runner, cell.checkpointing)
            step_bytes[name] = _bytes_of_a_step(runner, cell, device)
    rivals.checkpointing = cell.checkpointing
    if REFERENCE not in step_bytes:
        return {}
    seconds: dict[str, list[float]] = {name: [] for name in step_bytes}
    order, chance, longest = list(seconds), random.Random(0), 0.0
    for turn in range(ROUNDS):
        if turn and budget.left < 2 * longest:
            break
        began = budget.spent
        chance.shuffle(order)
        batch = random_batch(cell.tokens, device, turn)
        for name in order:
            budget.ask(longest / len(order))
            seconds[name].append(rivals.runners[name].seconds(batch))
        longest = max(longest, budget.spent - began)
    rows: dict[str, Any] = {}
    for name, values in seconds.items():
        look = _look_seconds(rivals, name, random_batch(cell.tokens, device, 0), median(values))
        share = rivals.event_seconds.get(name, 0.0) + look + rivals.runners[name].sum_seconds()
        rows[name] = compared(values, seconds[REFERENCE], share) | {
            "look_seconds_per_step": look,
            "peak_bytes": None,
            "memory_ratio": None,
        }
        if device == "cuda":
            extra = max(step_bytes[name], rivals.event_bytes.get(name, 0))
            rows[name]["peak_bytes"] = rivals.base_bytes + rivals.own_bytes[name] + extra
            rows[name]["memory_ratio"] = rows[name]["peak_bytes"] / rows[REFERENCE]["peak_bytes"]
    return rows


def _checkpoint(runner: Runner, wanted: bool) -> None:
    if wanted:
        runner.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # pyright: ignore
    else:
        runner.model.gradient_checkpointing_disable()  # pyright: ignore


def _bytes_of_a_step(runner: Runner, cell: Cell, device: str) -> int:
    """The most bytes above what lies there between steps. It is also the first step of its shape."""
    runner.model.train(False).train()  # gives back the sums that layers keep, which are part of what a step needs
    before = allocated(device)
    reset_peak(device)
    runner.step(random_batch(cell.tokens, device, 0))
    return peak(device) - before


def _look_seconds(rivals: Rivals, name: str, batch: Any, plain: float) -> float:
    """What looks at second moments add per step, where a method has them and there is time to see some."""
    runner = rivals.runners[name]
    if runner.handle is None or runner.handle.white is None:
        return 0.0
    runner.looks.clear()
    for _ in range(LOOKS):
        rivals.budget.ask(2 * plain)
        runner.handle.white.moments.open()
        runner.seconds(batch)
    return runner.look_seconds(plain)
