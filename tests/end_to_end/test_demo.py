"""The demo's road with the real packaged model, a few steps long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.real
def test_the_demo_recipe_trains_the_real_model(tmp_path):
    small = [
        "task.data.train_size=16", "task.data.test_size=12",
        "training.max_steps=4", "training.learning_rate=3e-4", "method.options.interval=1",
        f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "scalora", "train", str(ROOT / "recipes" / "demo.yaml")]
    for override in small:
        command += ["--set", override]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["after"]["answer_nll"] < metrics["before"]["answer_nll"]
    assert metrics["rank"]["mean"] > 8
