"""What a run of any kind of task must do: learn, resume to the bit, be exported, loaded by plain PEFT and compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import scalora
from helpers import workspace
from scalora.arena import trial
from scalora.arena.contender import Contender
from scalora.arena.plan import Comparison
from scalora.cli import app
from scalora.runs.export.export import export
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Interrupted, train

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"


def documented(kind: str, folder: Path, **content: Any) -> Path:
    """The documentation's recipe for a kind of task, on what is in ``folder``; ``content`` replaces its own."""
    (written,) = re.findall(rf"```yaml\n(model: [^`]*\n  kind: {kind}[ \n][^`]*)```", DOCS.read_text(encoding="utf-8"))
    recipe = yaml.safe_load(written)
    recipe |= {"model": str(folder / "model"), "precision": "float32", "output": str(folder / "run")}
    recipe["task"]["data"] |= {"folder": str(folder), "test_size": 12, "validation_size": 8}
    recipe["training"] |= {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "learning_rate": 1e-2}
    recipe["training"] |= content.pop("training", {})
    recipe["task"] |= content.pop("task", {})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | content))
    return folder / "recipe.yaml"


def check_run(recipe: Path, inputs: dict[str, torch.Tensor], tmp_path: Path, lower: str, primary: str) -> Any:
    """One run of a recipe, in all that is done with it; its result.

    Args:
        recipe: with steps to stop at three of.
        inputs: what the model computes logits from.
        tmp_path: for other outputs.
        lower: a metric that training must make smaller.
        primary: the metric that counts.
    """
    whole = train(load_recipe(recipe))
    assert whole.after.metrics[lower] < whole.before.metrics[lower]
    assert whole.after.primary == primary
    cut = load_recipe(recipe, [f"output={tmp_path / 'cut'}"])
    with workspace.stopped_at(3), pytest.raises(Interrupted):
        train(cut)
    assert train(cut, resume=True).after.metrics == whole.after.metrics
    with torch.no_grad():
        wanted = scalora.load(whole.folder)(**inputs).logits
        names: dict[str, Any] = {}
        exec("\n".join(whole.loading), names)
        assert torch.equal(names["model"](**inputs).logits, wanted)
        for form in ("lora", "merged", "delta"):
            done = export(whole.folder, to=form, output=tmp_path / form)
            assert done.loss_about.startswith("mean over 8 validation")
            logits = scalora.load(done.folder)(**inputs).logits
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    comparison = Comparison(load_recipe(recipe), (Contender("lora", 2),), (1e-3, 1e-2), (0,), (0,))
    result = trial.run_trial(comparison, comparison.tuning()[0], lambda: None, every=60)
    assert result["primary"] == primary
    return whole


def check_other_methods(recipe: Path, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Methods that save otherwise: layers of their own, all of PEFT's, the dense merge, the weights themselves."""
    methods = ("{name: mora, rank: 4}", "{name: 'peft:LOHA', rank: 2}", "full",
               "{name: scalora-i, rank: 2, options: {interval: 2, accumulate: base}}")  # fmt: skip
    for number, method in enumerate(methods):
        out = tmp_path / str(number)
        run = train(load_recipe(recipe, [f"method={method}", f"output={out}", "training.max_steps=3"]), ranks=False)
        done = export(run.folder, to="merged", output=f"{out}-merged")
        with torch.no_grad():
            logits = [scalora.load(folder)(**inputs).logits for folder in (run.folder, done.folder)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4 * logits[0].abs().max().item())


def refused(recipe: Path, *overrides: str) -> str:
    """What the command line says of a recipe that it refuses: one line, with exit code 2."""
    overrides = (f"output={recipe.parent / 'refused'}", *overrides)
    options = [part for each in overrides for part in ("--set", each)]
    result = CliRunner().invoke(app, ["train", str(recipe), *options], env={"COLUMNS": "1000"})
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert not (recipe.parent / "refused").exists()
    return " ".join(result.output.split())
