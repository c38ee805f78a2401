"""Whole runs of small recipes: what they leave behind, resuming, loading the result elsewhere."""

import json
import math

import pytest
import torch

from helpers import tokenized, workspace
from scalora import ScaloraError
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Interrupted, train


@pytest.mark.parametrize("task", ["multiple_choice", "classification"])
@pytest.mark.parametrize("method", ["lora", "scalora-i", "scalora"])
def test_a_run_leaves_everything_it_promises(tmp_path, task, method):
    overrides = workspace.classification(tmp_path) if task == "classification" else []
    path = workspace.lay(tmp_path)
    options = [f"method={{name: {method}, rank: 2}}"]
    result = train(load_recipe(path, [*overrides, *options, "task.data.validation_size=10"]))
    folder = tmp_path / "run"
    for name in ("recipe.yaml", "metrics.json", "curves.png", "rank.png", "adapter/adapter_config.json"):
        assert (folder / name).is_file(), name
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 8
    assert metrics["after"]["nll"] < metrics["before"]["nll"]
    assert math.isfinite(metrics["validation"]["nll"])
    assert metrics["rank"]["mean"] >= (3 if method == "scalora" else 2)
    assert len(metrics["events"]) == {"lora": 0, "scalora-i": 1, "scalora": 8}[method]
    assert metrics["environment"]["versions"]["peft"]

    scope = {}
    exec("\n".join(result.loading), scope)
    model = scope["model"]
    ids = tokenized.tokenizer()("the cat sat", return_tensors="pt")["input_ids"]
    from scalora.tasks import build_task

    again = build_task(load_recipe(path, [*overrides, *options]).task).score(model, tokenized.tokenizer())
    assert again.metrics["nll"] == pytest.approx(metrics["after"]["nll"], abs=1e-5)
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_with_the_base_store_the_whole_model_is_saved(tmp_path):
    recipe = load_recipe(workspace.lay(tmp_path), ["method.options.accumulate=base"])
    result = train(recipe)
    scope = {}
    exec("\n".join(result.loading), scope)
    from scalora.tasks import build_task

    again = build_task(recipe.task).score(scope["model"], tokenized.tokenizer())
    assert again.metrics["nll"] == pytest.approx(result.metrics["after"]["nll"], abs=1e-5)
    assert result.metrics["rank"]["mean"] > 2


def test_an_interrupted_run_resumes_to_the_same_end(tmp_path):
    path = workspace.lay(tmp_path)
    whole = train(load_recipe(path, [f"output={tmp_path / 'whole'}"]))

    with workspace.stopped_at(5), pytest.raises(Interrupted, match="checkpoint-5"):
        train(load_recipe(path))
    assert not (tmp_path / "run" / "metrics.json").exists()
    resumed = train(load_recipe(path), resume=True)
    assert resumed.metrics["after"] == whole.metrics["after"]
    assert len(resumed.metrics["events"]) == len(whole.metrics["events"])
    with pytest.raises(ScaloraError, match="finished"):
        train(load_recipe(path), resume=True)


def test_output_folders_are_not_trampled_on(tmp_path):
    path = workspace.lay(tmp_path)
    train(load_recipe(path))
    with pytest.raises(ScaloraError, match=r"not empty.*--resume.*--overwrite"):
        train(load_recipe(path))
    first = (tmp_path / "run" / "metrics.json").read_text()
    with pytest.raises(ScaloraError, match="rank"):  # a run that fails gives the earlier one back
        train(load_recipe(path, ["method.rank=1000"]), overwrite=True)
    assert (tmp_path / "run" / "metrics.json").read_text() == first
    train(load_recipe(path), overwrite=True)
    assert (tmp_path / "run.previous" / "metrics.json").read_text() == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ScaloraError, match="not a run of scalora"):
        train(load_recipe(path, [f"output={tmp_path / 'mine'}"]), overwrite=True)
    with pytest.raises(ScaloraError, match="no checkpoint"):
        train(load_recipe(path, [f"output={tmp_path / 'new'}"]), resume=True)
    assert not (tmp_path / "new").exists()


def test_several_processes_that_cannot_find_one_another_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ScaloraError, match="WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT not set"):
        train(load_recipe(workspace.lay(tmp_path)))


def test_what_scalora_refuses_keeps_its_own_words(tmp_path):
    with pytest.raises(ScaloraError, match=r"^optimizer is .*Adafactor"):
        train(load_recipe(workspace.lay(tmp_path), ["training.optim=adafactor"]))
