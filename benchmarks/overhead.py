"""A whole training step of each method beside plain PEFT LoRA: one process, turns in changing order, medians.

    python -m benchmarks.overhead --model smollm2 --precision bf16 --repeats 30 --output benchmarks/results/overhead

Writes OUTPUT/MODEL-PRECISION.json. A step is forward, backward, clipping, AdamW and, for ScaLoRA, its events; times are
means over blocks of steps, so that each block holds its share of events, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from scalora.files import write_json
from scalora.methods import MethodSpec, build_method
from scalora.models import load_model
from scalora.provenance import environment, git_revision

MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {"source": "smollm2-135m-instruct", "head": "causal-lm", "batch": 8, "tokens": 128, "rank": 8},
    "minilm": {"source": "minilm-l6-v2", "head": "sequence-classification", "batch": 16, "tokens": 64, "rank": 8},
}
METHODS = (
    "lora",
    "scalora",
    "scalora-i",
    "scalora:base",
    "scalora-i:base",
    "relora",
    "mora",
    "hira",
    "dora",
    "lora@4r",
    "full",
)


class Runner:
    """One method on its own copy of the model, driven as Trainer would drive it."""

    def __init__(self, name: str, what: dict[str, Any], precision: str, device: str) -> None:
        labels = {"num_labels": 2} if what["head"] == "sequence-classification" else {}
        model, _ = load_model(what["source"], head=what["head"], **labels)
        method, _, option = name.partition(":")
        method, _, rank = method.partition("@")
        r = what["rank"] * (4 if rank else 1)
        spec = MethodSpec(name=method, rank=r, options={"accumulate": option} if option else {})
        torch.manual_seed(0)
        self.adapted = build_method(spec).adapt(model.to(device).train(), what["head"])
        self.model = self.adapted.model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.arguments = TrainingArguments(output_dir="unused", learning_rate=1e-4, use_cpu=device == "cpu")
        make = self.adapted.optimizer
        self.optimizer = make(self.arguments) if make else torch.optim.AdamW(self.trained, lr=1e-4)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
        self.state, self.control = TrainerState(max_steps=10_000), TrainerControl()
        self._tell("on_train_begin")

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        with self.autocast:
            loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self._tell("on_step_end")

    def _tell(self, event: str) -> None:
        for callback in self.adapted.callbacks:
            getattr(callback, event)(
                self.arguments, self.state, self.control, model=self.model, optimizer=self.optimizer
            )


def make_batch(what: dict[str, Any], device: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20_000, (what["batch"], what["tokens"]), generator=generator)
    labels = ids if what["head"] == "causal-lm" else ids[:, 0] % 2
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "labels": labels.to(device)}


def measure(
    runners: dict[str, Runner], what: dict[str, Any], device: str, rounds: int, block: int
) -> dict[str, list[float]]:
    """Seconds per step of each method, one number a round."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    order, chance = list(runners), random.Random(0)
    for turn in range(-1, rounds):  # round -1 warms up
        chance.shuffle(order)
        batch = make_batch(what, device, turn)
        for name in order:
            started = time.perf_counter()
            for _ in range(block):
                runners[name].step(batch)
            if device != "cpu":
                torch.accelerator.synchronize()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - started) / block)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=20, help="rounds")
    parser.add_argument("--block", type=int, default=10, help="steps a method takes in a row")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overhead"))
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # pyright: ignore
    what = MODELS[options.model]
    runners = {name: Runner(name, what, options.precision, device) for name in options.methods.split(",")}
    seconds = measure(runners, what, device, options.repeats, options.block)
    reference = seconds["lora"]
    table = Table("method", "s a step", "ratio to LoRA", "quartiles of the ratio")
    rows = {}
    for name, values in seconds.items():
        ratios = sorted(value / base for value, base in zip(values, reference, strict=True))
        quartiles = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        rows[name] = {"seconds": values, "median": median(values), "ratio": median(ratios), "quartiles": quartiles}
        table.add_row(name, f"{median(values):.4f}", f"{median(ratios):.3f}", "{:.3f} – {:.3f}".format(*quartiles))
    Console().print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    content = {
        "command": " ".join(["python -m benchmarks.overhead", *sys.argv[1:]]),
        "git_revision": git_revision(),
        "environment": environment(),
        **{key: what[key] for key in ("batch", "tokens", "rank")},
        "block": options.block,
        "methods": rows,
    }
    write_json(options.output / f"{options.model}-{options.precision}.json", content)


if __name__ == "__main__":
    main()
