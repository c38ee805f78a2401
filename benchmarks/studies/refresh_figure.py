"""The figure of docs/method.md: training loss over steps from the trials of a comparison.

python -m benchmarks.studies.refresh_figure
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from ..record import RESULTS

SHOWN = {
    "lora@2": ("LoRA, r = 2", "tab:gray"),
    "scalora-i@2": ("columns rescaled, r = 2", "tab:blue"),
    "scalora-refresh@2": ("refreshed every 25 steps, r = 2", "tab:red"),
    "lora@16": ("LoRA, r = 16", "black"),
    "full@2": ("full fine-tuning", "tab:green"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=Path, default=RESULTS / "digits" / "results.json")
    parser.add_argument("--output", type=Path, default=Path("docs/images/refresh.png"))
    options = parser.parse_args()
    trials = json.loads(options.trials.read_text(encoding="utf-8"))["trials"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for contender, (label, colour) in SHOWN.items():
        runs = [t for t in trials if t["stage"] == "final" and t["contender"] == contender and "losses" in t]
        steps = [step for step, _ in runs[0]["losses"]]
        losses = np.array([[loss for _, loss in run["losses"]] for run in runs])
        mean, error = losses.mean(0), losses.std(0, ddof=1) / len(runs) ** 0.5
        axes.plot(steps, mean, label=f"{label} ({runs[0]['lr']:g})", color=colour)
        axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    axes.legend(title="method (learning rate)")
    figure.tight_layout()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
