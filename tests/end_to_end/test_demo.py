"""The demo's road with the real packaged model, a few steps long; the README's example runs as it stands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_plain_loop_example_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "plain_loop.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Event(step=40" in done.stdout
    assert (tmp_path / "runs" / "plain_loop" / "adapter" / "adapter_config.json").is_file()


def test_the_readme_shows_the_example():
    """The ten lines of the README are those of the example that runs."""
    example = (ROOT / "examples" / "plain_loop.py").read_text()
    for line in (
        "model = get_peft_model(base,",
        "handle = scalora.attach(model, optimizer)",
        "scalora.save_plain_lora(model,",
    ):
        assert line in example
        assert line in (ROOT / "README.md").read_text()


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
