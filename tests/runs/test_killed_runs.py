"""Runs that end badly: killed while they train or write, without room on the disk, diverged, two at once."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from helpers import workspace
from scalora import ScaloraError
from scalora.common.disk_layout import SEAL
from scalora.common.files import is_sealed
from scalora.runs.folder import last_checkpoint
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train

VARYING = (
    "train_seconds",
    "steps_seconds",
    "seconds_per_step",
    "waited_share",
    "peak_memory_bytes",
    "environment",
    "log",
)


def _processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scalora.runs.training"])
    return context


def _run(recipe: str, overrides: list[str], resume: bool, deadly: int, counted: str) -> None:
    """In a process of its own: train, and be killed at the ``deadly``-th touch of a file in the output folder."""
    output = load_recipe(recipe, overrides).output
    touched = 0

    def listen(event: str, arguments: tuple) -> None:
        nonlocal touched
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and str(arguments[0]).startswith(output):
            touched += 1
            if touched == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)
    train(load_recipe(recipe, overrides), resume=resume)
    Path(counted).write_text(str(touched))


def _in_process(*arguments) -> int:
    process = _processes().Process(target=_run, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def _comparable(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    log = [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in metrics["log"]]
    return {**{k: v for k, v in metrics.items() if k not in VARYING}, "log": [e for e in log if "train_loss" not in e]}


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_a_run_killed_again_and_again_ends_bitwise_like_one_that_was_not(tmp_path, accumulate):
    recipe = str(workspace.lay(tmp_path))
    overrides = [f"method.options.accumulate={accumulate}", "training.save_steps=3", "training.save_total_limit=1"]
    if accumulate == "base":  # in an order that would be another one after a resume in the second epoch
        overrides += ["training.train_sampling_strategy=group_by_length", "task.data.train_size=16"]
    whole, killed, counted = tmp_path / "whole", tmp_path / "killed", tmp_path / "counted"
    assert _in_process(recipe, [*overrides, f"output={whole}"], False, 0, str(counted)) == 0
    touches = int(counted.read_text())
    assert touches > 30
    resumed_from = []
    for deadly in (2, touches // 5, touches // 2, 7, touches // 2 + 5, touches // 3, 0):
        checkpoint = last_checkpoint(killed)
        resumed_from.append(checkpoint and checkpoint.name)
        code = _in_process(recipe, [*overrides, f"output={killed}"], checkpoint is not None, deadly, str(counted))
        assert code == (-signal.SIGKILL if deadly else 0) or (code == 0 and resumed_from[-1])
        if code == 0:
            break
    assert {None, "checkpoint-3"} <= set(resumed_from)  # otherwise nothing was tried
    assert _comparable(killed) == _comparable(whole)
    for file in sorted((whole / "adapter").rglob("*.safetensors")):
        assert (killed / "adapter" / file.relative_to(whole / "adapter")).read_bytes() == file.read_bytes()
    ends = [last_checkpoint(folder) for folder in (whole, killed)]
    states = [torch.load(end / "optimizer.pt", weights_only=True)["state"] for end in ends]
    for mine, theirs in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (ends[0] / "scalora.safetensors").read_bytes() == (ends[1] / "scalora.safetensors").read_bytes()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A recipe and a run of it that lacks its end, with two checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = workspace.lay(folder)
    train(load_recipe(recipe))
    (folder / "run" / "metrics.json").unlink()
    return folder, recipe


def test_what_was_being_written_when_the_run_was_killed_does_not_count(stopped, tmp_path):
    folder, _ = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-8"
    (tmp_path / "run" / "checkpoints" / "checkpoint-8" / SEAL).unlink()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "scalora.safetensors"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_refused_by_file_name(stopped, tmp_path, file, how):
    folder, recipe = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "checkpoint-8" / file
    content = path.read_bytes()
    changed = {"cut": content[:-8], "changed": content[:-8] + bytes(b ^ 1 for b in content[-8:])}
    path.unlink() if how == "gone" else path.write_bytes(changed[how])
    overrides = [f"output={folder / 'run'}"]
    (folder / "run").rename(folder / "aside")
    (tmp_path / "run").rename(folder / "run")
    try:
        with pytest.raises(ScaloraError, match=rf"checkpoint-8 is damaged \(.*{path.name}.*delete it to resume"):
            train(load_recipe(recipe, overrides), resume=True)
    finally:
        shutil.rmtree(folder / "run")
        (folder / "aside").rename(folder / "run")


def test_another_base_model_is_refused_on_resume(stopped, tmp_path):
    folder, recipe = stopped
    weights = folder / "llama" / "model.safetensors"
    original = weights.read_bytes()
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name] + 0.5}, weights, metadata={"format": "pt"})
    try:
        with pytest.raises(ScaloraError, match=r"base model is another.*fingerprint"):
            train(load_recipe(recipe), resume=True)
    finally:
        weights.write_bytes(original)


def test_two_runs_do_not_share_a_folder(tmp_path):
    from scalora.runs.training import Watcher

    recipe = workspace.lay(tmp_path)

    class Second(Watcher):
        said = None

        def phase(self, text):
            if text == "training":
                for options in ({}, {"overwrite": True}):
                    with pytest.raises(ScaloraError, match="another run is at work"):
                        train(load_recipe(recipe), **options)
                self.said = text

    second = Second()
    train(load_recipe(recipe), watcher=second)
    assert second.said


def test_the_shell_of_a_run_killed_before_its_first_checkpoint_is_no_obstacle(tmp_path):
    recipe = workspace.lay(tmp_path)
    shell = tmp_path / "run"
    (shell / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    for name in ("recipe.yaml", "inputs.json", ".lock", "checkpoints/checkpoint-4/optimizer.pt"):
        (shell / name).write_text("")
    train(load_recipe(recipe))
    assert is_sealed(shell / "checkpoints" / "checkpoint-8")


@pytest.mark.parametrize("looks", [["training.save_steps=1"], ["training.logging_steps=50"]])  # the second: at ranks
def test_a_diverged_run_stops_and_keeps_its_earlier_checkpoint(looks, tmp_path):
    overrides = ["training.learning_rate=1e30", "training.max_grad_norm=0", *looks]
    recipe = load_recipe(workspace.lay(tmp_path), [*overrides, "training.optim=sgd", "method=lora"])
    with pytest.raises(ScaloraError, match=r"no longer finite at step \d.*training\.learning_rate \(it is 1e\+30\)"):
        train(recipe)


def _with_little_room(recipe: str, overrides: list[str], limit: int, said: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing on is then an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        train(load_recipe(recipe, overrides))
    except ScaloraError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(said).write_text(str(error))


@pytest.mark.parametrize(("method", "limit"), [("scalora-i", 12_000), ("lora", 20_000)])  # an adapter, the optimizer
def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(tmp_path, method, limit):
    recipe, said = str(workspace.lay(tmp_path)), tmp_path / "said"
    arguments = (recipe, [f"method={{name: {method}, rank: 2}}"], limit, str(said))
    process = _processes().Process(target=_with_little_room, args=arguments)
    process.start()
    process.join()
    assert "could not be written" in said.read_text()
    assert "make room" in said.read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["{name: lora}", "{name: white-refresh, rank: 2, options: {refresh: 2}}"])
def test_a_run_that_was_stopped_after_its_last_step_takes_no_other(method, tmp_path):
    """Trainer itself would take one more where `max_steps` counts."""
    recipe = workspace.lay(tmp_path)
    overrides = [
        f"method={method}", "training.max_steps=6", "training.save_steps=3",
        "training.lr_scheduler_type=constant", "training.num_train_epochs=3",
    ]  # fmt: skip
    whole = train(load_recipe(recipe, overrides)).metrics
    (tmp_path / "run" / "metrics.json").unlink()
    resumed = train(load_recipe(recipe, overrides), resume=True).metrics
    assert resumed["steps"] == whole["steps"] == 6
    assert resumed["after"] == whole["after"]
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-6"
