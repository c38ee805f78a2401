"""White LoRA, one change at a time: which part of it does what.

    python -m benchmarks.studies.white_ablations recipes/smollm2-recall.yaml --alpha 32 --lr 2e-3,4e-3,8e-3 --seeds 3

Tuned and run as :mod:`benchmarks.studies.variants` says. Adds to OUTPUT/white_ablations.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from scalora.algebra.whitening import Whitening, no_whitening, nystrom

from . import variants

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
    "exponent 1/8": {"exponent": 0.125},
    "exponent 3/8": {"exponent": 0.375},
    "exponent 3/8 refreshed every 25 steps": {"exponent": 0.375, "refresh": 25},
    "exponent 3/8 and damping 0.1": {"exponent": 0.375, f"{_WHITENING}.DAMPING": 0.1},
    "exponent 1/2 and damping 0.1": {"exponent": 0.5, f"{_WHITENING}.DAMPING": 0.1},
    "exponent 1/2 and damping 1": {"exponent": 0.5, f"{_WHITENING}.DAMPING": 1.0},
    "rescaled every 10 steps": {"interval": 10},
    "refreshed every 25 steps": {"refresh": 25},
    "refreshed every 12 steps": {"refresh": 12},
}
_OPTIONS = ("interval", "refresh", "exponent")


@contextmanager
def changed(name: str) -> Iterator[list[str]]:
    """One variant in force; what it sets in the recipe."""
    changes = VARIANTS[name]
    with ExitStack() as stack:
        for target, value in changes.items():
            if target not in _OPTIONS:
                stack.enter_context(patch(target, value))
        yield [f"method.options.{key}={value}" for key, value in changes.items() if key in _OPTIONS]


def main() -> None:
    parser = variants.parser(__doc__, VARIANTS, "2e-3,4e-3,8e-3")
    parser.add_argument("--alpha", default="16")
    given = parser.parse_args()
    names = variants.chosen(parser, given, list(VARIANTS))

    def trial(name: str, lr: str, seed: int, split: Any) -> float | None:
        with changed(name) as options:
            return variants.scored(
                given, lr, seed, split, "method.name=white-lora", f"method.alpha={given.alpha}", *options
            )

    key = f"{Path(given.recipe).stem}, alpha {given.alpha}"
    variants.run(given, names, given.output / "white_ablations.json", key, trial)


if __name__ == "__main__":
    main()
