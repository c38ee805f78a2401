"""The demo's budget, spent on plain LoRA and on ScaLoRA-I: three learning rates each, chosen on a validation split.

    python -m benchmarks.studies.demo_comparison [--seeds 0 1 2]

Each run is ``scalora train recipes/demo.yaml`` with overrides. Results go to benchmarks/results/demo_comparison.json as
they come; what is there already is not run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .. import record

RATES = (3e-4, 1e-3, 3e-3)
METHODS = ("lora", "scalora-i")
VALIDATION = 500  # rows
KEPT = ("before", "validation", "after", "steps", "seconds_per_step", "trainable_parameters", "rank", "environment")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = record.parser(__doc__, "demo_comparison.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    results = record.earlier(options.output)
    for seed in options.seeds:
        for rate in RATES:
            for method in METHODS:
                key = f"{method} lr={rate:g} seed={seed}"
                if key not in results:
                    results[key] = run(method, rate, seed)
                    record.save(options.output, results)
    for method in METHODS:
        for seed in options.seeds:
            runs = {rate: results[f"{method} lr={rate:g} seed={seed}"] for rate in RATES}
            best = min(runs, key=lambda rate: runs[rate]["validation"]["nll"])
            after = runs[best]["after"]
            test = f"test accuracy {after['accuracy']:.3f}, nll {after['nll']:.4f}"
            print(f"{method:10} seed {seed}: lr {best:g} by validation nll; {test}")


def run(method: str, rate: float, seed: int) -> dict:
    """One training run; its metrics."""
    output = Path("runs") / "demo_comparison"
    overrides = {
        "method.name": method, "training.learning_rate": rate, "training.seed": seed,
        "task.data.validation_size": VALIDATION, "output": output,
    }  # fmt: skip
    command = [sys.executable, "-m", "scalora", "train", "recipes/demo.yaml", "--overwrite"]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, check=True)
    metrics = json.loads((output / "metrics.json").read_text())
    return {"command": " ".join(["scalora", *command[3:]]), **{key: metrics[key] for key in KEPT}}


if __name__ == "__main__":
    main()
