"""The figures of docs/method.md: training loss over steps at what tuning chose, from the trials of a comparison.

python -m benchmarks.studies.loss_figures
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from scalora.arena.contender import parse_contender
from scalora.arena.results import read_comparison
from scalora.arena.statistics import final_runs

from ..record import RESULTS

# Picture → its comparison, and the contenders that are drawn, in words and colour.
FIGURES = {
    "refresh": (
        "digits",
        {
            "lora@2": ("LoRA, r = 2", "tab:gray"),
            "scalora-i@2": ("columns rescaled, r = 2", "tab:blue"),
            "scalora-refresh@2": ("refreshed every 25 steps, r = 2", "tab:red"),
            "lora@16": ("LoRA, r = 16", "black"),
            "full@2": ("full fine-tuning", "tab:green"),
        },
    ),
    "white": (
        "smollm2-recall",
        {
            "lora@8": ("LoRA, r = 8", "tab:gray"),
            "lora@32": ("LoRA, r = 32", "black"),
            "mora@8": ("MoRA, r = 8", "tab:orange"),
            "full@8": ("full fine-tuning", "tab:green"),
            "hira@8": ("HiRA, r = 8", "tab:blue"),
            "white-refresh@8": ("refreshed in white coordinates, r = 8", "tab:red"),
        },
    ),
}


def draw(name: str, path: Path) -> None:
    """Draw one of the figures: the mean over seeds, with a band of its standard error."""
    folder, shown = FIGURES[name]
    record = read_comparison(RESULTS / folder)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for text, (label, colour) in shown.items():
        choice = record.chosen[parse_contender(text, 0)]
        curves = [run["losses"] for run in final_runs(record.results, choice).values()]
        losses = np.array([[loss for _, loss in curve] for curve in curves])
        steps, mean, error = [step for step, _ in curves[0]], losses.mean(0), losses.std(0, ddof=1) / len(curves) ** 0.5
        axes.plot(steps, mean, label=f"{label} ({choice.lr:g})", color=colour)
        axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    axes.legend(title="method (learning rate of the common grid)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder (%(default)s)")
    options = parser.parse_args()
    for name in FIGURES:
        draw(name, options.output / f"{name}.png")


if __name__ == "__main__":
    main()
