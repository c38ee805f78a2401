"""A whole training step of each method beside plain PEFT LoRA: one process, turns in changing order, medians.

    python -m benchmarks.cost.overhead --model smollm2 --precision bf16 --repeats 12

Writes OUTPUT/MODEL-PRECISION.json. A step is forward, backward, clipping and AdamW; ScaLoRA's events are timed apart,
as a mean that holds its share of recompressions, and added over the interval. So is what layers keep from one event to
the next. Its store is in its steady state. Steps that look at second moments are timed apart too, and what they take
more is added over the steps between them. On a CPU
it is the processor time of one thread (:mod:`benchmarks.cost.clock`). Peak memory is that of three steps in a process
of its own, above what the imports take.
"""

from __future__ import annotations

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from scalora.common import environment as provenance

from .. import record
from .clock import described, one_thread
from .runner import PRECISIONS, Runner, load_runner, make_batch

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
    "white-refresh",
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
        name: runner.event_seconds(batch) + runner.look_seconds(median(seconds[name])) + runner.sum_seconds(batch)
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
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="bf16 is autocast, bf16-base the base's without it"
    )
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
