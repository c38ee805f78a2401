"""White LoRA, one change at a time: which part of it does what.

    python -m benchmarks.studies.white_ablations recipes/smollm2-recall.yaml --alpha 32 --lr 2e-3,4e-3,8e-3 --seeds 3

Each variant is tuned over the rates on the validation split with the first seed beyond those of the final runs, and
runs on the test split at the best one. Trials that are there are not run again. Adds to OUTPUT/white_ablations.json.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from scalora.algebra.whitening import Whitening, no_whitening, nystrom
from scalora.common.errors import ScaloraError
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train

from .. import record

_WHITENING = "scalora.algebra.whitening"
_MOMENTS, _STEPS = "scalora.engine.white.moments", "scalora.engine.white.steps.WhiteSteps"


def _one_side(kept: Literal["outputs", "inputs"]) -> Callable[..., list[Whitening]]:
    """In place of `nystrom`, which sees each group's outputs and then its inputs: only one is whitened."""

    def found(*arguments: Any) -> list[Whitening]:
        sides = itertools.cycle(("outputs", "inputs"))
        return [white if next(sides) == kept else no_whitening(white.U) for white in nystrom(*arguments)]

    return found


def _nothing(*_: Any) -> None:
    pass


# Variant → what is put in whose place.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "only inputs are whitened": {f"{_MOMENTS}.nystrom": _one_side("inputs")},
    "only output gradients are": {f"{_MOMENTS}.nystrom": _one_side("outputs")},
    "B stays as it was drawn": {f"{_STEPS}._begin": _nothing},
    "means do not turn along": {f"{_STEPS}._turn": _nothing},
    "the first three looks only": {"scalora.engine.white.steps.due": lambda step: step + 1 < 3},
    "looks every 20 steps": {f"{_MOMENTS}.EVERY": 20},
    "16 directions": {f"{_MOMENTS}.DIRECTIONS": 16},
    "64 directions": {f"{_MOMENTS}.DIRECTIONS": 64},
    "damping 0.001": {f"{_WHITENING}.DAMPING": 0.001},
    "damping 0.1": {f"{_WHITENING}.DAMPING": 0.1},
    "damping 1": {f"{_WHITENING}.DAMPING": 1.0},
    "exponent 1/8": {f"{_WHITENING}.EXPONENT": 0.125},
    "exponent 3/8": {f"{_WHITENING}.EXPONENT": 0.375},
    "exponent 3/8 refreshed every 25 steps": {f"{_WHITENING}.EXPONENT": 0.375, "refresh": 25},
    "exponent 3/8 and damping 0.1": {f"{_WHITENING}.EXPONENT": 0.375, f"{_WHITENING}.DAMPING": 0.1},
    "exponent 1/2 and damping 0.1": {f"{_WHITENING}.EXPONENT": 0.5, f"{_WHITENING}.DAMPING": 0.1},
    "exponent 1/2 and damping 1": {f"{_WHITENING}.EXPONENT": 0.5, f"{_WHITENING}.DAMPING": 1.0},
    "rescaled every 10 steps": {"interval": 10},
    "refreshed every 25 steps": {"refresh": 25},
    "refreshed every 12 steps": {"refresh": 12},
}
_OPTIONS = ("interval", "refresh")


@contextmanager
def changed(name: str) -> Iterator[list[str]]:
    """One variant in force; what it sets in the recipe."""
    changes = VARIANTS[name]
    with ExitStack() as stack:
        for target, value in changes.items():
            if target not in _OPTIONS:
                stack.enter_context(patch(target, value))
        yield [f"method.options.{key}={value}" for key, value in changes.items() if key in _OPTIONS]


def trial(place: str, overrides: list[str], name: str, alpha: str, lr: str, seed: int, split: Any) -> float | None:
    """The nll of one run; None where it diverged."""
    with changed(name) as options, tempfile.TemporaryDirectory() as folder:
        own = [
            "method.name=white-lora", f"method.alpha={alpha}", f"training.learning_rate={lr}", f"training.seed={seed}",
            f"training.data_seed={seed}", "training.save_strategy='no'", f"output={folder}/run", *options,
        ]  # fmt: skip
        recipe = load_recipe(place, [*overrides, *own])
        try:
            return train(recipe, split=split, baseline=False, ranks=False).metrics["after"]["nll"]
        except ScaloraError as error:
            if "finite" not in str(error):
                raise
            return None


def main() -> None:
    parser = record.parser(__doc__, "")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--alpha", default="16")
    parser.add_argument("--lr", default="2e-3,4e-3,8e-3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    given = parser.parse_args()
    path = given.output / "white_ablations.json"
    for name in given.variants.split(","):
        if name not in VARIANTS:
            parser.error(f"--variants {name!r}: choose among {', '.join(VARIANTS)}")
        _run(name, given, path)
    stored = record.earlier(path)[_key(given)]["variants"]
    table = Table("variant", "lr", "test nll")
    for name, found in stored.items():
        values = [value for value in found["final"].values() if value is not None]
        error = f" ± {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        table.add_row(name, found["lr"], f"{mean(values):.4f}{error}" if values else "diverged")
    Console().print(table)


def _run(name: str, given: Any, path: Path) -> None:
    """What is missing of one variant; written after every trial."""
    rates = given.lr.split(",")
    for stage, lr, seed in itertools.chain(
        (("tune", lr, given.seeds) for lr in rates), (("final", None, seed) for seed in range(given.seeds))
    ):
        stored = record.earlier(path)  # others may write beside this one
        found = stored.setdefault(_key(given), {"variants": {}})
        variant = found["variants"].setdefault(name, {"tune": {}, "final": {}})
        if stage == "final":
            tuned = {rate: value for rate, value in variant["tune"].items() if rate in rates and value is not None}
            best = min(tuned, key=lambda rate: tuned[rate], default=rates[0])
            if variant.get("lr") != best:
                variant |= {"lr": best, "final": {}}
            lr = best
        place, key = variant[stage], lr if stage == "tune" else str(seed)
        if key not in place:
            split = "validation" if stage == "tune" else "test"
            place[key] = trial(given.recipe, given.set, name, given.alpha, lr, seed, split)
            found |= record.header()
            record.save(path, stored)


def _key(given: Any) -> str:
    return f"{Path(given.recipe).stem}, alpha {given.alpha}"


if __name__ == "__main__":
    main()
