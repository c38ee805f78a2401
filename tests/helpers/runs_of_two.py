"""Recipes trained in one process and in two, and what is left by them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file
from torch import Tensor

from scalora.runs import loading, training
from scalora.runs.recipe import load_recipe

# Adam's first steps would enlarge rounding.
STEADY = ["training.logging_steps=1", "training.adam_epsilon=1e-3", "training.learning_rate=1e-3"]


def double_precision(wanted: bool = True) -> Any:
    """Float64, in which only what is wrong can make a difference."""
    plain = loading.load_model

    def load(*args: Any, **options: Any) -> Any:
        model, tokenizer = plain(*args, **options)
        return model.double(), tokenizer

    return patch.object(loading, "load_model", load if wanted else plain)


def batch(rows: int) -> list[str]:
    """The batch of each process: 4 in one process are 2 in each of two."""
    return [f"training.per_device_train_batch_size={rows}"]


def train_recipe(recipe: Any, overrides: Sequence[str], resume: bool = False) -> training.RunResult:
    return training.train(load_recipe(recipe, overrides), resume=resume)


def left_by(run: Path) -> tuple[dict[str, Any], list[float], dict[str, Tensor]]:
    """Metrics, losses and saved tensors of a run."""
    metrics = json.loads((run / "metrics.json").read_text())
    losses = [entry["loss"] for entry in metrics["log"] if "loss" in entry]
    files = sorted((run / "adapter").rglob("*.safetensors"))
    return metrics, losses, {f"{f.name}/{name}": tensor for f in files for name, tensor in load_file(f).items()}
