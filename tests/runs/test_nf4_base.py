"""Runs on an NF4 base: what trains, what is saved, and what loads the result, all stand on the same weights."""

import shutil

import pytest
import torch

import scalora
from helpers import exports, workspace
from scalora import ScaloraError
from scalora.algebra.nf4 import nf4_rounded
from scalora.common.disk_layout import QUANTISED_BASE
from scalora.common.quiet import quiet
from scalora.runs import training
from scalora.runs.export.export import export
from scalora.runs.inputs import Inputs
from scalora.runs.loading import load_inputs, made_ready
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Interrupted, train

RUNS = {
    "lora": ["method=lora"],
    "scalora": ["method.options={interval: 1}"],
    "hira": ["method=hira"],
    "mora": ["method=mora"],
    "full": ["method=full"],
}
NF4 = "quantization=nf4-rounded"


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    quiet()
    return exports.lay(tmp_path_factory.mktemp("laid"))


def _logits(model):
    with torch.no_grad():
        return model.float().eval()(input_ids=exports.IDS).logits


def test_the_targeted_weights_are_rounded_once_and_nothing_else(ground):
    recipe = [load_recipe(ground, [*options, "method.target_modules=[q_proj, down_proj]"]) for options in ([], [NF4])]
    plain, rounded = (made_ready(load_inputs(each), None).model for each in recipe)
    others = dict(plain.named_parameters())
    for name, weight in rounded.named_parameters():
        targeted = "q_proj.weight" in name or "down_proj.weight" in name
        assert torch.equal(weight, nf4_rounded(others[name]) if targeted else others[name]), name


def test_the_fingerprint_tells_the_two_bases_apart(ground):
    plain, rounded = (Inputs.of(load_inputs(load_recipe(ground, options))).base_model for options in ([], [NF4]))
    assert rounded == f"{plain}-nf4"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_its_adapter_load_as_they_were_trained(name, ground, tmp_path, monkeypatch):
    seen, count = [], training._count

    def spy(model):  # called on the trained model just before it is saved
        seen.append(_logits(model))
        return count(model)

    monkeypatch.setattr(training, "_count", spy)
    run = exports.run(ground, f"nf4-{name}", NF4, *RUNS[name])
    (trained,) = seen
    torch.testing.assert_close(exports.logits(run.loading), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(_logits(scalora.load(run.folder)), trained, rtol=0, atol=1e-5)
    moved = tmp_path / "moved"
    shutil.copytree(run.folder / "adapter", moved)
    torch.testing.assert_close(_logits(scalora.load(moved)), trained, rtol=0, atol=1e-5)
    merged = export(run.folder, to="merged", output=tmp_path / "merged").folder
    torch.testing.assert_close(_logits(scalora.load(merged)), trained, rtol=0, atol=1e-4)
    if name != "full":
        (moved / QUANTISED_BASE).unlink()
        assert (_logits(scalora.load(moved)) - trained).abs().max() > 1e-3, "the note is what makes the difference"
        with pytest.raises(ScaloraError, match=r"nf4.*--to merged"):
            export(run.folder, to="delta", output=tmp_path / "delta")
    if name in ("lora", "scalora"):
        last = scalora.load(run.folder / "checkpoints" / "checkpoint-4")
        torch.testing.assert_close(_logits(last), trained, rtol=0, atol=1e-5)
        assert "scalora.load" in (run.folder / "adapter" / "README.md").read_text()


def test_a_resumed_run_stands_on_the_same_weights(ground, tmp_path):
    short = [NF4, "method=lora", "training.max_steps=8"]
    straight = train(load_recipe(ground, [*short, f"output={tmp_path / 'one'}"]), baseline=False)
    parts = load_recipe(ground, [*short, f"output={tmp_path / 'two'}"])
    with workspace.stopped_at(4), pytest.raises(Interrupted):
        train(parts, baseline=False)
    with pytest.raises(ScaloraError, match="quantization is 'none', but 'nf4-rounded'"):
        train(parts.model_copy(update={"quantization": "none"}), resume=True)
    resumed = train(parts, resume=True, baseline=False)
    assert torch.equal(exports.logits(resumed.loading), exports.logits(straight.loading))
    assert resumed.metrics["after"] == straight.metrics["after"]


def test_a_damaged_note_is_one_message(ground, tmp_path):
    run = exports.run(ground, "damaged", NF4, "method=lora")
    (run.folder / "adapter" / QUANTISED_BASE).write_bytes(b"nothing")
    with pytest.raises(ScaloraError, match=f"{QUANTISED_BASE} cannot be used"):
        scalora.load(run.folder)


def test_tied_weights_are_refused(ground):
    tied = f"model={ground.parent / 'tied'}"
    with pytest.raises(ScaloraError, match="lm_head shares its weight"):
        load_inputs(load_recipe(ground, [NF4, tied, "method.target_modules=[q_proj, lm_head]"]))
