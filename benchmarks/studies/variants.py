"""Variants of one method on one recipe: each tuned over rates on the validation split, then run on the test split.

Tuning takes the first seed beyond those of the final runs. Trials that are there are not run again, and others may
write to the same file beside this one.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from scalora.common.errors import ScaloraError
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train

from .. import record

Trial = Callable[[str, str, int, Any], float | None]  # of variant, rate, seed and split


def parser(doc: str | None, variants: Iterable[str], lr: str) -> argparse.ArgumentParser:
    """Options of a study: a recipe, what is changed in it, rates, seeds and variants."""
    found = record.parser(doc, "")
    found.add_argument("recipe")
    found.add_argument("--set", action="append", default=[])
    found.add_argument("--lr", default=lr)
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--variants", default=",".join(variants), help="separated by commas")
    return found


def chosen(found: argparse.ArgumentParser, given: Any, variants: Sequence[str]) -> list[str]:
    """The variants asked for; an unknown one ends the program."""
    names = given.variants.split(",")
    for name in names:
        if name not in variants:
            found.error(f"--variants {name!r}: choose among {', '.join(variants)}")
    return names


def run(given: Any, names: Sequence[str], path: Path, key: str, trial: Trial) -> None:
    """Run what is missing of these variants, kept under ``key`` in the file after every trial, and print all of it."""
    for name in names:
        _variant(name, given, path, key, trial)
    table = Table("variant", "lr", "test nll")
    for name, found in record.earlier(path)[key]["variants"].items():
        values = [value for value in found["final"].values() if value is not None]
        error = f" ± {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        table.add_row(name, found["lr"], f"{mean(values):.4f}{error}" if values else "diverged")
    Console().print(table)


def _variant(name: str, given: Any, path: Path, key: str, trial: Trial) -> None:
    rates = given.lr.split(",")
    for stage, lr, seed in itertools.chain(
        (("tune", lr, given.seeds) for lr in rates), (("final", None, seed) for seed in range(given.seeds))
    ):
        stored = record.earlier(path)  # others may write beside this one
        found = stored.setdefault(key, {"variants": {}})
        variant = found["variants"].setdefault(name, {"tune": {}, "final": {}})
        if stage == "final":
            tuned = {rate: value for rate, value in variant["tune"].items() if rate in rates and value is not None}
            best = min(tuned, key=lambda rate: tuned[rate], default=rates[0])
            if variant.get("lr") != best:
                variant |= {"lr": best, "final": {}}
            lr = best
        place, trial_key = variant[stage], lr if stage == "tune" else str(seed)
        if trial_key not in place:
            place[trial_key] = trial(name, lr, seed, "validation" if stage == "tune" else "test")
            found |= record.header()
            record.save(path, stored)


def scored(given: Any, lr: str, seed: int, split: Any, *own: str) -> float | None:
    """The nll of one run of the recipe with these settings; None where it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        common = [
            f"training.learning_rate={lr}", f"training.seed={seed}", f"training.data_seed={seed}",
            "training.save_strategy='no'", f"output={folder}/run",
        ]  # fmt: skip
        recipe = load_recipe(given.recipe, [*given.set, *own, *common])
        try:
            return train(recipe, split=split, baseline=False, ranks=False).metrics["after"]["nll"]
        except ScaloraError as error:
            if "finite" not in str(error):
                raise
            return None
