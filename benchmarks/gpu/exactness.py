"""Whether events leave the function alone on the device too: the greatest change of float32 logits.

A step with learning rate 0 changes nothing but what events, refreshes and looks change. Every fifth step is a real one,
so that they have something to do.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import scalora

from ..cost.runner import Runner
from .budget import Budget
from .failures import Failures
from .models import random_batch, random_model, sharing_weights
from .rivals import FEW, Cell, make_runner

METHODS = ("scalora", "scalora:base", "scalora-refresh", "white-lora")
STEPS = 27  # events of every kind, two looks past the first and one refresh
LIMIT = 1e-5  # that a logit may change by


def measure(cell: Cell, device: str, budget: Budget, failures: Failures) -> dict[str, Any]:
    """By method: the greatest change of a logit over all steps, that by saving and loading, and the greatest logit.

    In float32 without autocast, on a model of this size, with adapters of this rank.
    """
    cell = cell._replace(precision="float32")
    rows: dict[str, Any] = {}
    for name in METHODS:
        with failures.noting(cell, f"exactness of {name}"):
            base = random_model(cell.size, torch.float32, device)
            runner = make_runner(name, cell, sharing_weights(base))
            batch = random_batch(min(cell.tokens, FEW), device, 0)
            change = _through_steps(runner, batch, budget)
            written = runner.handle is not None and runner.handle.config.accumulate == "base"
            rows[name] = {
                "change": change,
                "reloaded": None if written else _reloaded(runner, base, batch),
                "greatest_logit": float(_logits(runner.model, batch).abs().max()),
            }
    return rows


def _through_steps(runner: Runner, batch: dict[str, Tensor], budget: Budget) -> float:
    (group,) = runner.optimizer.param_groups
    rate, greatest = group["lr"], 0.0
    for step in range(STEPS):
        budget.ask()
        runner.backward(batch)
        before = _logits(runner.model, batch)
        real = step % 5 == 3
        group["lr"] = rate if real else 0.0
        runner.optimizer.step()
        runner.optimizer.zero_grad()
        if not real:
            greatest = max(greatest, float((_logits(runner.model, batch) - before).abs().max()))
    return greatest


def _reloaded(runner: Runner, base: Any, batch: dict[str, Tensor]) -> float:
    """By PEFT alone, on the same base."""
    with tempfile.TemporaryDirectory() as folder:
        path = scalora.save_plain_lora(runner.model, Path(folder) / "adapter")
        loaded = PeftModel.from_pretrained(sharing_weights(base), str(path))
    return float((_logits(loaded, batch) - _logits(runner.model, batch)).abs().max())


@torch.no_grad()
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits
