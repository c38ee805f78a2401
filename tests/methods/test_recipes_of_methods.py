"""Every method through ``scalora train``'s own road: a recipe in, a scored and saved result out."""

import math

import pytest

from helpers import tokenized, training, workspace
from scalora import ScaloraError
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Interrupted, train
from scalora.tasks import build_task

NAMES = [
    "alpha-lora", "relora", "mora", "lora-ga", "scalora-oracle", "full", "peft:LOHA", "lora+", "riemannian", "lora-fa",
    "lora-muon", "loft", "lora-pro", "lora-rite", "polar",
]  # fmt: skip
OPTIONS = {"alpha-lora": "{batch: 4, every: 2}", "relora": "{every: 3}", "mora": "{type: 1}"}


@pytest.mark.parametrize("task", ["multiple_choice", "classification"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_a_method(name, task, tmp_path):
    path = workspace.lay(tmp_path)
    overrides = workspace.classification(tmp_path) if task == "classification" else []
    overrides += [
        f"method={{name: '{name}', rank: 2, options: {OPTIONS.get(name, '{}')}}}",
        "training.learning_rate=2e-3",
    ]
    recipe = load_recipe(path, overrides)
    result = train(recipe)
    assert result.metrics["steps"] == 8
    assert math.isfinite(result.metrics["after"]["nll"])
    assert result.metrics["after"]["nll"] != result.metrics["before"]["nll"]
    assert result.metrics["rank"]["mean"] >= 2
    again = build_task(recipe.task).score(training.run_lines(result.loading), tokenized.tokenizer())
    assert again.metrics["nll"] == pytest.approx(result.metrics["after"]["nll"], abs=1e-5)


def test_a_penalty_that_would_count_for_every_batch_is_refused(tmp_path):
    path = workspace.lay(tmp_path)
    method = "method={name: 'peft:ADALORA', options: {total_step: 9}}"
    with pytest.raises(ScaloraError, match="gradient_accumulation_steps is 2, so many times"):
        train(load_recipe(path, [method, "training.gradient_accumulation_steps=2"]))


def test_a_run_that_its_checkpoints_do_not_hold_is_not_resumed(tmp_path):
    path = workspace.lay(tmp_path)
    budget = "{total_step: 8, tinit: 1, tfinal: 1, init_r: 4, target_r: 2}"
    method = f"method={{name: 'peft:ADALORA', options: {budget}}}"
    with workspace.stopped_at(4), pytest.raises(Interrupted):
        train(load_recipe(path, [method]))
    with pytest.raises(ScaloraError, match=r"peft:ADALORA.*cannot be resumed: start anew \(--overwrite\)"):
        train(load_recipe(path, [method]), resume=True)
    best = ["training.load_best_model_at_end=true", "training.eval_strategy=steps", "training.eval_steps=4"]
    with pytest.raises(ScaloraError, match="load_best_model_at_end is true, but peft:ADALORA"):
        train(load_recipe(path, [method, *best, "task.data.validation_size=8"]), overwrite=True)
