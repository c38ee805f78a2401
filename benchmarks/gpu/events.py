"""An event alone: milliseconds, and how often the host waits for the device and launches something on it.

An ordinary event and one with a recompression (adapter store), one of the base store, a refresh and its half-way change
of sketches, a step in white coordinates with and without a look.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from scalora.engine.event import ScaLora
from scalora.engine.stores.adapter import SLOTS, AdapterStore

from ..cost.clock import now
from ..cost.runner import Runner
from .rivals import Rivals, allocated, peak, reset_peak

REPEATS = 3
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel")


class Kind(NamedTuple):
    """What is measured: each time something has to be brought about first, gradients lying there."""

    name: str
    prepare: Callable[[], object]
    run: Callable[[], object]
    per_step: float  # how many of it there are in a step


def measure(rivals: Rivals, counted: bool) -> list[dict[str, Any]]:
    """A row per method and kind of event; the rivals learn what events take per step, and of memory.

    Launches are counted if `counted`: the profiler takes seconds for what runs in milliseconds.
    """
    rows: list[dict[str, Any]] = []
    for name, runner in rivals.runners.items():
        if runner.handle is None:
            continue
        with rivals.failures.noting(rivals.cell, f"events of {name}"):
            for kind in _kinds(rivals, runner, runner.handle):
                row = _measured(rivals, runner, kind, counted)
                rows.append({"method": name, "kind": kind.name} | row)
                own = rivals.event_seconds.get(name, 0.0) + kind.per_step * row["milliseconds"] / 1e3
                rivals.event_seconds[name] = own
                rivals.event_bytes[name] = max(rivals.event_bytes.get(name, 0), row["peak_bytes"] or 0)
    return rows


def _kinds(rivals: Rivals, runner: Runner, handle: ScaLora) -> list[Kind]:
    if handle.refresh is not None:
        return _of_a_refresh(rivals, runner, handle)
    if handle.white is not None:
        return _of_white_steps(runner, rivals, handle)
    every = handle.config.interval or 1
    if not isinstance(store := handle.store, AdapterStore):
        return [Kind("event", lambda: None, handle.rescale, 1 / every)]

    def make_room() -> None:
        while store.free < 1:
            handle.rescale()

    def fill() -> None:
        while store.free >= 1:
            handle.rescale()

    return [
        Kind("event", make_room, handle.rescale, (1 - 1 / SLOTS) / every),
        Kind("event with recompression", fill, handle.rescale, 1 / SLOTS / every),
    ]


def _of_a_refresh(rivals: Rivals, runner: Runner, handle: ScaLora) -> list[Kind]:
    refresh = handle.refresh
    assert refresh is not None
    kinds = []
    for name, at in (("sketch turned round", refresh.every // 2), ("refresh", refresh.every)):
        while handle.step < at:
            rivals.budget.ask()
            runner.step(rivals.batch)
        runner.backward(rivals.batch)
        sketches = refresh.sketch.state_dict()
        runner.optimizer.zero_grad()
        kinds.append(
            Kind(
                name,
                lambda sketches=sketches: refresh.sketch.load_state_dict(sketches),
                lambda at=at: refresh.before_step(at),
                1 / refresh.every,
            )
        )
    return kinds


def _of_white_steps(runner: Runner, rivals: Rivals, handle: ScaLora) -> list[Kind]:
    white = handle.white
    assert white is not None

    def look() -> None:
        white.moments.open()
        runner.optimizer.zero_grad()
        runner.backward(rivals.batch)

    # Both are part of the steps that are measured elsewhere. Step 5 is none that opens a look.
    return [
        Kind("gradients made white", white.moments.detach, lambda: white.before_step(5), 0.0),
        Kind("look", look, lambda: white.before_step(5), 0.0),
    ]


def _measured(rivals: Rivals, runner: Runner, kind: Kind, counted: bool) -> dict[str, Any]:
    device, budget = rivals.device, rivals.budget
    runner.optimizer.zero_grad()
    before = allocated(device)
    runner.backward(rivals.batch)
    times: list[float] = []
    bytes_taken = 0
    for _ in range(1 + REPEATS):
        budget.ask(1.5 * max(times, default=0.0))
        kind.prepare()
        reset_peak(device)
        started = now()
        kind.run()
        times.append(now() - started)
        bytes_taken = max(bytes_taken, peak(device) - before)
    row: dict[str, Any] = {
        "milliseconds": 1e3 * median(times[1:]),
        "first_milliseconds": 1e3 * times[0],  # with whatever a device loads at first use
        "peak_bytes": None,
        "synchronisations": None,
        "launches": None,
        "waits": None,
    }
    if device == "cuda":
        row["peak_bytes"] = bytes_taken
        kind.prepare()
        row["synchronisations"] = _synchronisations(kind.run)
        if counted:
            kind.prepare()
            row |= _calls(kind.run)
    runner.optimizer.zero_grad()
    return row


def _synchronisations(run: Callable[[], object]) -> int:
    """How often torch says that it waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in found)


def _calls(run: Callable[[], object]) -> dict[str, int]:
    """Kernel launches, and waits for a stream: the latter are those of solvers' libraries too."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    counts = {each.key: each.count for each in profiler.key_averages()}
    return {
        "launches": sum(count for key, count in counts.items() if key.startswith(LAUNCHES)),
        "waits": sum(counts.get(key, 0) for key in ("cudaStreamSynchronize", "cudaEventSynchronize")),
    }
