"""Recipes trained by two real processes under DDP: what one process gives, for the same batch of a step."""

import json
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from helpers import heads, workspace
from helpers.runs_of_two import STEADY, batch, double_precision, left_by, train_recipe
from helpers.two_processes import spawn
from scalora import ScaloraError
from scalora.common.files import is_sealed
from scalora.runs import loading, training

METHODS = {
    "lora": [], "scalora": [], "scalora-i": [], "scalora-refresh": ["method.options.refresh=4"], "white-lora": [],
    "white-scalora": [], "white-refresh": ["method.options.refresh=4"],
    "hira": [], "mora": [], "alpha-lora": ["method.options.batch=4"], "lora-ga": [], "pissa": [], "loft": [],
    "relora": [], "flora": [], "loftq": ["quantization=nf4-rounded"], "peft:LOHA": [], "peft:IA3": [],
    "peft:GRALORA": [],
}  # fmt: skip
# In float32, as recipes are; the others in float64.
SINGLE = ("lora", "scalora-i", "mora", "pissa", "flora", "loftq")


def _of_method(folder, name, rows):
    values = [f"output={folder}/{rows}/{name}", f"method={{name: '{name}', rank: 2}}", "training.save_strategy=no"]
    return [*batch(rows), *STEADY, *values, *METHODS[name]]


def _methods(rank, folder):
    for name in METHODS:
        with double_precision(name not in SINGLE):
            train_recipe(f"{folder}/recipe.yaml", _of_method(folder, name, 2))


def test_every_kind_of_method_gives_what_it_gives_in_one_process(tmp_path):
    recipe = workspace.lay(tmp_path)
    for name in METHODS:
        with double_precision(name not in SINGLE):
            train_recipe(recipe, _of_method(tmp_path, name, 4))
    spawn(_methods, str(tmp_path))
    for name in METHODS:
        (alone, losses, tensors), (metrics, theirs, others) = (left_by(tmp_path / rows / name) for rows in ("4", "2"))
        assert (alone["processes"], metrics["processes"]) == (1, 2)
        assert len(losses) == 8
        assert losses == pytest.approx(theirs, rel=1e-6), name  # logged in float32
        for when in ("before", "after"):
            assert alone[when] == pytest.approx(metrics[when], abs=1e-6), name
        assert alone["rank"] == metrics["rank"], name
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert torch.allclose(tensor, others[key], rtol=0, atol=1e-6), (name, key)


KINDS = {
    "completion": ["task={kind: completion, prompt: '{text}', completion: ' yes', answer: '[a-z]+', max_new_tokens: 3, "
                   "data: {train: %s, test_size: 19, columns: {id: id}}}"],
    "text": ["task={kind: text, max_length: 16, data: {train: %s, train_size: 30, test_size: 19, columns: {id: id}}}"],
    "packed": ["task={kind: text, documents: apart, max_length: 15, "
               "data: {train: %s, train_size: 36, test_size: 19, columns: {id: id}}}"],
    "preference": ["task={kind: preference, data: {train: %p, test_size: 19}}"],
    "group_by_length": ["training.train_sampling_strategy=group_by_length", "score_batch_size=3"],
    "gradient_checkpointing": ["training.gradient_checkpointing=true", "training.gradient_accumulation_steps=2"],
    "validation": ["task.data.validation_size=8", "training.eval_strategy=steps", "training.eval_steps=2",
                   "training.save_steps=2", "training.metric_for_best_model=nll",
                   "training.load_best_model_at_end=true"],
}  # fmt: skip


HEADS = ("seq2seq", "token_classification", "image_classification")
UNDROPPED = [
    "method=lora",
    "training.gradient_accumulation_steps=2",
    heads.UNDROPPED,
]


def _of_kind(folder, kind, rows):
    if kind in HEADS:
        return [*batch(rows), *STEADY, f"output={folder}/{rows}/{kind}", *heads.recipes(folder, 19)[kind]]
    own = (v.replace("%s", f"{folder}/data.jsonl").replace("%p", f"{folder}/pairs.jsonl") for v in KINDS[kind])
    return [*batch(rows), *STEADY, f"output={folder}/{rows}/{kind}", *own]


def _kinds(rank, folder):
    with double_precision():
        for kind in (*KINDS, *HEADS):
            train_recipe(f"{folder}/recipe.yaml", _of_kind(folder, kind, 2))
    classified = [*workspace.classification(Path(folder)), *batch(2), *STEADY, f"output={folder}/2/bert"]
    train_recipe(f"{folder}/recipe.yaml", [*classified, *UNDROPPED])


def test_every_kind_of_task_is_scored_as_in_one_process(tmp_path):
    recipe = workspace.lay(tmp_path)
    texts = [f"the {word} {one} {two}" for word in ("cat", "dog", "sky", "mat") for one in "abcd" for two in "efgh"]
    heads.lay(tmp_path)
    pairs = [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    with double_precision():
        found = {kind: train_recipe(recipe, _of_kind(tmp_path, kind, 4)) for kind in (*KINDS, *HEADS)}
    classified = [*workspace.classification(tmp_path), *batch(4), *STEADY, f"output={tmp_path}/4/bert"]
    found["bert"] = train_recipe(recipe, [*classified, *UNDROPPED])
    spawn(_kinds, str(tmp_path))
    for kind, result in found.items():
        metrics, losses, _ = left_by(tmp_path / "2" / kind)
        expected = [entry["loss"] for entry in result.metrics["log"] if "loss" in entry]
        assert losses == pytest.approx(expected, abs=1e-6), kind
        for when in ("before", "after", "validation"):
            assert metrics[when] == pytest.approx(result.metrics[when], abs=1e-6), kind


SAVED = [*batch(2), "training.save_steps=3", "training.logging_steps=1"]


def _stopped(rank, folder):
    recipe, values = f"{folder}/recipe.yaml", SAVED
    train_recipe(recipe, [*values, f"output={folder}/whole"])

    class Stop(training.StopOnSignal):
        def on_step_end(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 5:  # the other one hears of it
                self._receive(signal.SIGTERM, None)
            super().on_step_end(args, state, control, **kwargs)

    values = [*values, f"output={folder}/stopped"]
    with patch.object(training, "StopOnSignal", Stop), pytest.raises(training.Interrupted) as caught:
        train_recipe(recipe, values)
    assert str(caught.value.checkpoint).endswith("checkpoint-5")
    train_recipe(recipe, values, resume=True)


def test_one_signalled_process_stops_both_and_the_run_resumes_bitwise(tmp_path):
    recipe = workspace.lay(tmp_path)
    spawn(_stopped, str(tmp_path))
    (whole, losses, tensors), (resumed, theirs, others) = (left_by(tmp_path / name) for name in ("whole", "stopped"))
    assert losses == theirs
    assert whole["after"] == resumed["after"]
    assert whole["events"] == resumed["events"]
    assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
    (tmp_path / "stopped" / "metrics.json").unlink()
    with pytest.raises(ScaloraError, match="of a run on 2 processes, and this is one on 1"):
        train_recipe(recipe, [*SAVED, f"output={tmp_path}/stopped"], resume=True)


def _failing(rank, folder):
    def refused(match, *overrides, **options):
        with pytest.raises(ScaloraError, match=match):
            train_recipe(f"{folder}/recipe.yaml", [*batch(2), *overrides], **options)

    refused("method.name is 'scalora-oracle', which is trained in one process", "method.name=scalora-oracle")
    adalora = "method={name: 'peft:ADALORA', options: {total_step: 8}}"
    refused("method.name is 'peft:ADALORA', which is trained in one process", adalora)
    refused("there is no checkpoint", resume=True)  # what only the first process sees
    for place, name in ((loading, "check_positions"), (training.StepTimer, "on_step_end")):
        # What only the other one sees, before training and in it.
        with patch.object(place, name, side_effect=ScaloraError("mine")) if rank else nullcontext():
            refused(r"mine \(process 1 of 2")
    refused(
        "no longer finite", "training.learning_rate=1e30", "training.max_grad_norm=0", "training.optim=sgd",
        "training.save_steps=1", "method=lora",
    )  # fmt: skip
    with patch.dict("os.environ", ACCELERATE_USE_DEEPSPEED="true"):
        refused("configured with DeepSpeed")
    with patch.dict("os.environ", ACCELERATE_MIXED_PRECISION="bf16"):
        refused("mixed_precision 'bf16', but the recipe's precision is 'float32'")
    refused("data of train are others than those of the first process", f"task.data.train={folder}/{rank}.jsonl")


def test_what_one_process_finds_ends_both_with_its_message(tmp_path):
    workspace.lay(tmp_path)
    lines = (tmp_path / "data.jsonl").read_text().splitlines(True)
    (tmp_path / "0.jsonl").write_text("".join(lines))
    (tmp_path / "1.jsonl").write_text("".join(lines[::-1]))
    spawn(_failing, str(tmp_path))
    assert not (tmp_path / "run").exists() or all(map(is_sealed, (tmp_path / "run" / "checkpoints").iterdir()))
