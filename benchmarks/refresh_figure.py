"""The figure of docs/method.md: training loss over steps from the trials of a comparison.

python -m benchmarks.refresh_figure
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

RESULTS = Path("benchmarks/results/digits/results.json")
PICTURE = Path("docs/images/refresh.png")
SHOWN = {
    "lora@2": ("LoRA, r = 2", "tab:gray"),
    "scalora-i@2": ("columns rescaled, r = 2", "tab:blue"),
    "scalora-refresh@2": ("refreshed every 25 steps, r = 2", "tab:red"),
    "lora@16": ("LoRA, r = 16", "black"),
    "full@2": ("full fine-tuning", "tab:green"),
}


def main() -> None:
    trials = json.loads(RESULTS.read_text(encoding="utf-8"))["trials"]
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
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
