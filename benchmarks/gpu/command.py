"""Steps, memory, events and exactness on a CUDA device, in a given time; on a CPU in the smallest form.

    python -m benchmarks.gpu --seconds 150

The most important comparisons come first, and the file is written anew after each, so that a run that is stopped keeps
what it has. Seconds count from the start of the program's own work, without Python's imports. Seconds of methods are
as in :mod:`benchmarks.cost.overhead`: steps in turns, in changing order; events and looks timed apart, their share
added over the interval. Memory is the peak of a step, or of an event where that is more.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from .. import record
from ..cost.clock import described, one_thread
from . import events, exactness, step
from .budget import Budget, OutOfTimeError
from .failures import Failures
from .models import LENGTH, SIZES, VOCABULARY
from .rivals import PRECISIONS, Cell, Rivals

LARGEST = 8 * 4096  # billions of weights by tokens, past which a comparison waits for all others


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = device == "cpu"
    parser = record.parser(__doc__, "gpu.json")
    parser.add_argument("--sizes", default="tiny" if small else "1,0.1,8", help="billions of weights (%(default)s)")
    parser.add_argument("--ranks", default="8" if small else "8,64", help="(%(default)s)")
    parser.add_argument("--tokens", default="64" if small else "4096,512,16384", help="of a batch (%(default)s)")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=150, help="that all of it may take (%(default)s)")
    options = parser.parse_args()
    for option, known in (("sizes", SIZES), ("precisions", PRECISIONS)):
        for value in getattr(options, option).split(","):
            if value not in known:
                parser.error(f"--{option} {value}: choose from {', '.join(known)}")
    budget, failures = Budget(options.seconds), Failures()
    one_thread()
    cells = in_order(
        options.sizes.split(","),
        options.precisions.split(","),
        [int(rank) for rank in options.ranks.split(",")],
        [int(tokens) for tokens in options.tokens.split(",")],
    )
    content: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "clock": described(),
        "vocabulary": VOCABULARY,
        "models": {size: SIZES[size] for size in options.sizes.split(",")},
        "cells": [],
        "events": [],
        "exactness": {},
        "failures": failures.found,
        "left_out": [str(cell) for cell in cells],
    }
    rivals: Rivals | None = None
    for cell in cells:
        began = budget.spent
        try:
            if rivals is None or rivals.cell.model != cell.model:
                rivals = None  # its memory is needed
                rivals = Rivals(cell, device, budget, failures)
                counted = cell.size != "8" and all(row["size"] != cell.size for row in content["events"])
                place = {"size": cell.size, "precision": cell.precision, "rank": cell.rank}
                content["events"] += [place | row for row in events.measure(rivals, counted)]
            found: dict[str, Any] = {}
            with failures.noting(cell, "all of it"):
                found = step.measure(rivals, cell)
            seconds = budget.spent - began
            content["cells"].append(as_row(cell, found, seconds))
            content["left_out"].remove(str(cell))
            ratios = ", ".join(f"{name} {row['ratio']:.3f}" for name, row in found.items())
            print(f"{budget.spent:.0f} s | {cell} | {seconds:.1f} s | {ratios}", flush=True)
            record.write(options.output, content)
            if not content["exactness"]:
                least = cell._replace(size=min(options.sizes.split(","), key=list(SIZES).index))
                content["exactness"] = exactness.measure(least, device, budget, failures)
                print(f"{budget.spent:.0f} s | exactness | {content['exactness']}", flush=True)
                record.write(options.output, content)
        except OutOfTimeError:
            print(f"{budget.spent:.0f} s | no time for the rest", flush=True)
            break
    record.write(options.output, content)
    print(f"{budget.spent:.0f} s | written to {options.output}; left out: {len(content['left_out'])}", flush=True)


def in_order(sizes: list[str], precisions: list[str], ranks: list[int], tokens: list[int]) -> list[Cell]:
    """All of them: the largest last, else small ranks first and as they are given; those of one model together."""
    cells = [Cell(s, p, r, t) for r, p, s, t in product(sorted(ranks), precisions, sizes, tokens)]
    return sorted(cells, key=lambda cell: cell.size == "8" and cell.tokens > 4096)


def as_row(cell: Cell, found: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A comparison as it is recorded."""
    length = min(LENGTH, cell.tokens)
    batch = {"batch": cell.tokens // length, "length": length, "checkpointing": cell.checkpointing}
    return cell._asdict() | batch | {"seconds": seconds, "methods": found}


if __name__ == "__main__":
    main()
