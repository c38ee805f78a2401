"""Whatever wrong a public function is given, one message names it, its value and the way out."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from transformers import Trainer, TrainingArguments

import scalora
from helpers import models
from helpers.attached import attached
from scalora import ScaLoraConfig, ScaloraError
from scalora.engine.plain_lora import Truncation


@pytest.fixture(scope="module")
def trained():
    model, optimizer, handle = attached()
    models.train(model, optimizer, "llama", 2)
    return model, handle


def _create(model=None, cls=torch.optim.AdamW, **arguments):
    given = models.lora("llama") if model is None else model
    return scalora.create_scalora_optimizer(given, cls, **{"lr": 1e-3, **arguments})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: scalora.fuse_lora("x"), "model is 'x': give a PEFT model"),
        (lambda: scalora.attach("x", None), "optimizer is a NoneType"),
        (lambda: scalora.prepare(3), "model is 3: give a PEFT model"),
        (lambda: scalora.prepare(models.lora("llama"), models.lora("llama")), "config is a PeftModel: give a Sca"),
        (lambda: _create(lr="1e-3"), r"AdamW does not take lr='1e-3' \("),
        (lambda: _create(lr=-1), "AdamW does not take lr=-1"),
        (lambda: _create(weight_deacy=1), "does not take lr=0.001, weight_deacy=1"),
        (lambda: _create(interval=3), r"write config=ScaLoraConfig\(interval=3\)"),
        (lambda: _create(foo=3), r"^optimizer_cls AdamW does not take lr=0.001, foo=3"),
        (lambda: _create(cls=torch.nn.Linear), "optimizer_cls Linear does not take"),
        (lambda: _create(cls=models.base("llama")), "optimizer_cls is a LlamaForCausalLM|optimizer_cls .* not take"),
        (lambda: _create(model="m"), "model is 'm'"),
        (lambda: _create(model=models.base("llama").requires_grad_(False)), "has no trainable LoRA layer"),
        (lambda: ScaLoraConfig(intervall=3), r"'intervall' \(did you mean 'interval'\?\)"),
        (lambda: ScaLoraConfig(foo=3), "config has a field 'foo': ScaLoraConfig's are"),
        (lambda: scalora.ScaLoraCallback(foo=3), "was given foo: it takes config and resume_from"),
        (lambda: ScaLoraConfig(3), "given 3 without a name"),
        (lambda: scalora.prepare(models.lora("llama"), {"cappacity": 3}), "did you mean 'capacity'"),
        (lambda: scalora.ScaLoraCallback(interval=3), r"write config=ScaLoraConfig\(interval=3\)"),
        (lambda: scalora.ScaLoraCallback(intervall=3), r"write config=ScaLoraConfig\(interval=3\)"),
        (lambda: scalora.ScaLoraCallback(model=3), "was given model: it takes config and resume_from"),
        (lambda: scalora.ScaLoraCallback(resume_from="nonexist"), "resume_from is 'nonexist', which is no folder"),
        (lambda: scalora.ScaLoraCallback(resume_from=True), "resume_from is True, which is no folder"),
        (lambda: scalora.load("nonexist"), "there is no 'nonexist'"),
        (lambda: scalora.load("nonexist", base=models.base("llama")), "base is a LlamaForCausalLM: give the folder or"),
        (lambda: scalora.load("nonexist", base=""), "base is '': give the folder or"),
        (lambda: Truncation(rank=3, factors=3), "factors is 3"),
    ],
)
def test_what_is_refused_in_one_message(call, words):
    with pytest.raises(ScaloraError, match=words) as refusal:
        call()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("place", ["file/below", "file", "x" * 300, "a\0b", "/"])
def test_a_place_that_cannot_be_written_to(place, trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    path = place if place == "/" else f"{tmp_path}/{place}"
    with pytest.raises(ScaloraError, match=f"^path (is )?{re.escape(repr(path))}"):
        scalora.save_plain_lora(trained[0], path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (Truncation, "factors is <class"),
        (lambda layer: 3, "factors gave 3 for layer base_model"),
        (lambda layer: (torch.zeros(3, 2), torch.zeros(3, 2)), r"factors gave \(3, 2\) and \(3, 2\) for layer"),
        (lambda layer: (torch.zeros(32, 2), torch.zeros(2, 32)), r"\(32, 2\) and \(2, 32\) for layer .* Q \(32, k\)"),
    ],
)
def test_factors_of_no_layer(factors, words, trained, tmp_path):
    with pytest.raises(ScaloraError, match=words):
        scalora.save_plain_lora(trained[0], tmp_path / "adapter", factors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "value"), [("config", None), ("step", "x"), ("store", 3), ("constants", torch.zeros(1)), ("scales", {})]
)
def test_a_state_with_a_wrong_part_changes_nothing(part, value, trained):
    handle, before = trained[1], trained[1].state_dict()
    with pytest.raises(ScaloraError, match=f"state has .*{part}.*give what handle.state_dict"):
        handle.load_state_dict({**before, "step": 7, part: value})
    assert handle.step == before["step"]
    assert torch.equal(handle.constants, before["constants"])


def test_a_resumed_run_that_does_not_resume_is_refused(tmp_path):
    callback = scalora.ScaLoraCallback(resume_from=tmp_path)
    rows = [{"input_ids": row, "labels": row} for row in models.batch("llama")["input_ids"]]
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    with pytest.raises(ScaloraError, match=r"resume_from is .* but training begins anew"):
        Trainer(models.lora("llama"), arguments, train_dataset=rows, callbacks=[callback]).train()


def test_a_configuration_is_copied_and_pickled_as_any_dataclass():
    config = ScaLoraConfig(interval=3, scaling="scalar")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config
