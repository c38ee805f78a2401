"""Whole runs of small recipes: what they leave behind, resuming, loading the result elsewhere."""

import json
import math

import pytest
import torch

from helpers import tokenized, workspace
from scalora import ScaloraError
from scalora.runs.folder import last_checkpoint
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Interrupted, Watcher, train


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
    for overwrite in (True, False):  # a run named neither: the way out is another folder
        with pytest.raises(ScaloraError, match=r"mine.*not a run of scalora.*choose another \(--set output") as error:
            train(load_recipe(path, [f"output={tmp_path / 'mine'}"]), overwrite=overwrite)
        assert ("replaced" in str(error.value)) == overwrite
        assert "--overwrite" not in str(error.value)
    with pytest.raises(ScaloraError, match="no checkpoint"):
        train(load_recipe(path, [f"output={tmp_path / 'new'}"]), resume=True)
    assert not (tmp_path / "new").exists()


def _tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_the_users_own_is_never_removed(tmp_path):
    path = workspace.lay(tmp_path)
    train(load_recipe(path))
    previous = tmp_path / "run.previous"
    previous.mkdir()
    for name in ("thesis.txt", "recipe.yaml"):  # a recipe alone is what its author wrote
        (previous / name).write_text("precious")
        before = _tree(tmp_path)
        with pytest.raises(ScaloraError, match=r"run\.previous' is not a run.*rename it, or choose another output"):
            train(load_recipe(path), overwrite=True)
        assert _tree(tmp_path) == before
        (previous / name).unlink()
    previous.rmdir()
    (tmp_path / "precious").mkdir()
    previous.symlink_to(tmp_path / "precious")  # an empty folder elsewhere, which stays
    train(load_recipe(path), overwrite=True)
    assert (previous / "metrics.json").is_file()
    assert list((tmp_path / "precious").iterdir()) == []


def test_a_recipe_in_its_own_output_folder_is_neither_overwritten_nor_removed(tmp_path):
    path = workspace.lay(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "recipe.yaml").write_text(path.read_text() + "# by hand\n")
    for overrides in ([], ["task.data.train=/nope.jsonl"]):
        with pytest.raises(ScaloraError, match="not empty and not a run of scalora"):
            train(load_recipe(own / "recipe.yaml", [f"output={own}", *overrides]))
    assert [file.name for file in own.iterdir()] == ["recipe.yaml"]
    assert (own / "recipe.yaml").read_text().endswith("# by hand\n")


def test_a_run_that_comes_to_nothing_leaves_the_earlier_ones_where_they_were(tmp_path, monkeypatch):
    path = workspace.lay(tmp_path)
    for seed in (1, 2):
        train(load_recipe(path, [f"training.seed={seed}"]), overwrite=True)
    before = _tree(tmp_path)
    with pytest.raises(ScaloraError, match="no file /nope"):
        train(load_recipe(path, ["task.data.train=/nope.jsonl"]), overwrite=True)
    assert _tree(tmp_path) == before

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("scalora.runs.folder.write_text", full)
        with pytest.raises(ScaloraError, match="cannot be written: No space"):
            train(load_recipe(path), overwrite=True)
    assert _tree(tmp_path) == before
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path / "run")
        with pytest.raises(ScaloraError, match="the folder that you are in"):
            train(load_recipe(path, ["output=."]), overwrite=True)
    assert _tree(tmp_path) == before


def test_an_unfinished_run_does_not_take_a_finished_ones_place(tmp_path):
    path, run, previous = workspace.lay(tmp_path), tmp_path / "run", tmp_path / "run.previous"
    told = []

    class Listener(Watcher):
        def say(self, text):
            told.extend([text] if "the run that was in" in text else [])

    def stopped(step):
        with workspace.stopped_at(step), pytest.raises(Interrupted):
            train(load_recipe(path), overwrite=True, watcher=Listener())

    first = train(load_recipe(path)).metrics
    for step in (3, 2):
        stopped(step)
        assert (
            last_checkpoint(run) == run / "checkpoints" / f"checkpoint-{step}"
        )  # of two, the one that was stopped last
        assert json.loads((previous / "metrics.json").read_text())["after"] == first["after"]
    assert "is kept in" in told[0]
    assert "was not finished, and goes" in told[1]
    assert len(told) == 2
    stopped_run = _tree(run)
    with pytest.raises(ScaloraError, match="no file /nope"):
        train(load_recipe(path, ["task.data.train=/nope.jsonl"]), overwrite=True)
    assert _tree(run) == stopped_run
    train(load_recipe(path, ["training.seed=7"]), overwrite=True)
    assert json.loads((previous / "metrics.json").read_text())["after"] == first["after"]
    assert not (tmp_path / ".run.overwritten").exists()
    train(load_recipe(path), overwrite=True, watcher=Listener())
    assert "in place of the run that was there" in told[-1]
    assert "seed: 7" in (previous / "recipe.yaml").read_text()


@pytest.mark.parametrize("moved", [1, 2])
def test_a_process_killed_between_two_moves_loses_nothing(tmp_path, moved):
    path, run, previous = workspace.lay(tmp_path), tmp_path / "run", tmp_path / "run.previous"
    for seed in (1, 2):
        train(load_recipe(path, [f"training.seed={seed}"]), overwrite=True)
    previous.rename(tmp_path / ".run.overwritten")
    if moved == 2:
        run.rename(previous)
    else:
        with pytest.raises(ScaloraError, match="no file /nope"):
            train(load_recipe(path, ["task.data.train=/nope.jsonl"]), overwrite=True)
        assert "seed: 1" in (previous / "recipe.yaml").read_text()
    train(load_recipe(path, ["training.seed=3"]), overwrite=True)
    assert "seed: 2" in (previous / "recipe.yaml").read_text()
    assert not (tmp_path / ".run.overwritten").exists()


def test_several_processes_that_cannot_find_one_another_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ScaloraError, match="WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT not set"):
        train(load_recipe(workspace.lay(tmp_path)))


def test_what_scalora_refuses_keeps_its_own_words(tmp_path):
    with pytest.raises(ScaloraError, match=r"^optimizer is .*Adafactor"):
        train(load_recipe(workspace.lay(tmp_path), ["training.optim=adafactor"]))
