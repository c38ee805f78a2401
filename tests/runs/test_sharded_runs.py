"""Recipes trained on a model that FSDP2 shards over two real processes, as accelerate launch orders it."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from helpers import heads, workspace
from helpers.runs_of_two import STEADY, batch, double_precision, left_by, train_recipe
from helpers.two_processes import spawn
from scalora import ScaloraError
from scalora.layers.sharding import is_sharded
from scalora.runs import training

LAUNCHED = {  # by accelerate launch
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
METHODS = {
    "lora": [],
    "scalora": [],
    "scalora-refresh": ["method.options.refresh=4"],
    "white-lora": [],
    "white-scalora": [],
    "white-refresh": ["method.options.refresh=4"],
}
WRITES = ["task={kind: completion, prompt: '{text}', completion: ' yes', answer: '[a-z]+', max_new_tokens: 3, "
          "data: {train: %s/data.jsonl, test_size: 19, columns: {id: id}}}"]  # fmt: skip


HEADS = ("classification", "token_classification", "image_classification")
HALF = ["dtype=bfloat16", "method=lora"]  # factors of events would enlarge what rounding makes of other batches


def _values(folder, name, rows):
    output = f"output={folder}/{rows}/{name}"
    if name == "half":
        return [*batch(rows), *STEADY, output, *HALF]
    if name == "classification":
        head = ["head_learning_rate=3e-3", heads.UNDROPPED]
        return [*batch(rows), *STEADY, output, *workspace.classification(Path(folder)), *head]
    if name in HEADS:
        return [*batch(rows), *STEADY, output, *heads.recipes(folder, 19)[name]]
    if name == "writes":
        return [*batch(rows), *STEADY, output, *(value.replace("%s", str(folder)) for value in WRITES)]
    return [*batch(rows), *STEADY, output, f"method={{name: {name}, rank: 2}}", *METHODS[name]]


ALL = (*METHODS, "writes", *HEADS, "half")


def _sharded(rank, folder):
    seen = []

    class Look(training.StepTimer):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(all(is_sharded(p) for p in kwargs["model"].parameters()))
            super().on_step_end(args, state, control, **kwargs)

    with patch.dict("os.environ", LAUNCHED), patch.object(training, "StepTimer", Look):
        for name in ALL:
            with double_precision(name != "half"):
                train_recipe(f"{folder}/recipe.yaml", _values(folder, name, 2))
    assert len(seen) == 8 * len(ALL)
    assert all(seen)


def test_a_sharded_model_gives_what_one_process_gives(tmp_path):
    recipe = workspace.lay(tmp_path)
    heads.lay(tmp_path)
    for name in ALL:
        with double_precision(name != "half"):
            train_recipe(recipe, _values(tmp_path, name, 4))
    spawn(_sharded, str(tmp_path))
    for name in ALL:
        near = 1e-5 if name == "half" else 1e-6
        (alone, losses, tensors), (metrics, theirs, others) = (left_by(tmp_path / rows / name) for rows in ("4", "2"))
        assert losses == pytest.approx(theirs, rel=near, abs=1e-7), name  # logged in float32
        for when in ("before", "after"):
            assert alone[when] == pytest.approx(metrics[when], abs=near), name
        assert (alone["rank"], alone["trainable_parameters"]) == (metrics["rank"], metrics["trainable_parameters"])
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert torch.allclose(tensor, others[key], rtol=0, atol=near), (name, key)


KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


def _resumed(rank, folder):
    for kind in KINDS:
        recipe, values = f"{folder}/recipe.yaml", [*batch(2), "training.save_steps=3", "training.logging_steps=1"]
        with patch.dict("os.environ", {**LAUNCHED, "FSDP_STATE_DICT_TYPE": kind}):
            train_recipe(recipe, [*values, f"output={folder}/{kind}/whole"])
            values = [*values, f"output={folder}/{kind}/stopped"]
            with workspace.stopped_at(5), pytest.raises(training.Interrupted):
                train_recipe(recipe, values)
            train_recipe(recipe, values, resume=True)


def test_a_sharded_run_resumes_bitwise(tmp_path):
    workspace.lay(tmp_path)
    spawn(_resumed, str(tmp_path))
    for kind in KINDS:
        whole, resumed = (left_by(tmp_path / kind / name) for name in ("whole", "stopped"))
        assert whole[1] == resumed[1]
        assert whole[0]["after"] == resumed[0]["after"]
        assert whole[0]["events"] == resumed[0]["events"]
        assert all(torch.equal(tensor, resumed[2][key]) for key, tensor in whole[2].items())


def _refused(rank, folder):
    t5 = heads.recipes(folder, 19)["seq2seq"]
    for match, changed, *overrides in (
        ("fsdp_version: 2", {"FSDP_VERSION": "1"}),
        ("set it to false", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}),
        ("method.name is 'hira', which needs whole matrices", {}, "method={name: hira}"),
        ("quantization is 'nf4-rounded'", {}, "quantization=nf4-rounded"),
        ("method.options.accumulate is 'base'", {}, "method.options.accumulate=base"),
        ("encoder.embed_tokens has the weight of the input embeddings, which FSDP2 cannot shard", {}, *t5),
    ):
        with patch.dict("os.environ", {**LAUNCHED, **changed}), pytest.raises(ScaloraError, match=match):
            train_recipe(f"{folder}/recipe.yaml", overrides)


def test_what_cannot_be_sharded_is_refused_by_name(tmp_path):
    workspace.lay(tmp_path)
    heads.lay(tmp_path)
    spawn(_refused, str(tmp_path))
    assert not (tmp_path / "run").exists()
