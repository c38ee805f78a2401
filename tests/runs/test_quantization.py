"""Runs on bases that bitsandbytes and torchao keep packed: trained, resumed, loaded and exported as one function."""

import shutil

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import scalora
from helpers import exports, tokenized, workspace
from scalora import ScaloraError
from scalora.common.disk_layout import FORMER_NF4_BASE, QUANTISED_BASE
from scalora.common.quiet import quiet
from scalora.methods import build_method
from scalora.models import packed
from scalora.models.packed import LIBRARIES, packed_modules, unpacked
from scalora.runs import training
from scalora.runs.export.export import export
from scalora.runs.inputs import Inputs
from scalora.runs.loading import load_inputs, made_ready
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Interrupted, train

RUNS = {
    "lora": ["method=lora"],
    "scalora": ["method.options={interval: 1}"],
    "scalora-refresh": ["method=scalora-refresh", "method.options={refresh: 2, interval: 1}"],
    "white-lora": ["method=white-lora"],
    "dora": ["method=dora"],
    "hira": ["method=hira"],
    "loftq": ["method=loftq"],
}
HELD = [(quantization, name) for quantization in LIBRARIES for name in ("lora", "scalora", "scalora-refresh")]
HELD += [("nf4", name) for name in ("white-lora", "dora", "hira", "loftq")] + [("int8", "white-lora")]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """bitsandbytes counts in blocks of 64."""
    quiet()
    recipe = exports.lay(tmp_path_factory.mktemp("laid"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=tokenized.SIZE, pad_token_id=0, initializer_range=0.2, **sizes)
    ).save_pretrained(recipe.parent / "llama")
    return recipe


def _needs(quantization):
    pytest.importorskip(LIBRARIES[quantization])


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=exports.IDS).logits.float()


@pytest.mark.parametrize(("quantization", "name"), HELD)
def test_a_run_loads_and_exports_as_it_was_trained(quantization, name, ground, tmp_path, monkeypatch):
    _needs(quantization)
    seen, count = [], training._count

    def spy(model):  # called on the trained model just before it is saved
        seen.append(_logits(model))
        assert packed_modules(model), "what was trained was packed"
        return count(model)

    monkeypatch.setattr(training, "_count", spy)
    run = exports.run(ground, f"{quantization}-{name}", f"quantization={quantization}", *RUNS[name])
    (trained,) = seen
    losses = [entry["loss"] for entry in run.metrics["log"] if "loss" in entry]
    assert losses[-1] < losses[0]
    torch.testing.assert_close(exports.logits(run.loading), trained, rtol=0, atol=1e-4)
    moved = tmp_path / "moved"
    shutil.copytree(run.folder / "adapter", moved)
    torch.testing.assert_close(_logits(scalora.load(moved)), trained, rtol=0, atol=1e-4)
    last = run.folder / "checkpoints" / "checkpoint-4"
    torch.testing.assert_close(_logits(scalora.load(last)), trained, rtol=0, atol=1e-4)
    merged = export(run.folder, to="merged", output=tmp_path / "merged").folder
    torch.testing.assert_close(_logits(scalora.load(merged)), trained, rtol=0, atol=1e-4)
    assert not packed_modules(scalora.load(merged)), "floats, with the values of the packed base"
    with pytest.raises(ScaloraError, match=rf"in {quantization}.*--to merged"):
        export(run.folder, to="delta", output=tmp_path / "delta")
    if name in ("lora", "scalora"):
        lora = export(run.folder, to="lora", output=tmp_path / "lora").folder
        torch.testing.assert_close(_logits(scalora.load(lora)), trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantization", LIBRARIES)
def test_only_linear_weights_of_the_backbone_are_packed(quantization, ground):
    _needs(quantization)
    recipe = load_recipe(ground, [f"quantization={quantization}", "method=lora"])
    model = made_ready(load_inputs(recipe), None).model
    plain = LlamaForCausalLM.from_pretrained(recipe.model)
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(packed_modules(model)) == linear - {"lm_head"}
    for name, module in packed_modules(model).items():
        there = plain.get_submodule(name).weight
        error = (unpacked(module) - there).norm() / there.norm()
        assert 0 < error < (0.12 if quantization == "nf4" else 0.05)


@pytest.mark.parametrize("quantization", LIBRARIES)
def test_a_classification_head_and_a_bf16_run(quantization, tmp_path):
    _needs(quantization)
    recipe = exports.lay(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=tokenized.SIZE, **sizes)).save_pretrained(tmp_path / "bert")
    own = [*workspace.classification(tmp_path), "precision=bfloat16", f"quantization={quantization}"]
    run = exports.run(recipe, "run", *own)
    model = scalora.load(run.folder)
    assert model.config.num_labels == 2
    assert {"classifier", "bert.pooler.dense"}.isdisjoint(packed_modules(load_inputs(load_recipe(recipe, own)).model))
    torch.testing.assert_close(exports.logits(run.loading), _logits(model.float()), rtol=0, atol=1e-5)


def test_a_resumed_run_is_the_run(ground, tmp_path):
    _needs("nf4")
    short = ["quantization=nf4", "method.options={interval: 1}", "training.max_steps=8"]
    straight = train(load_recipe(ground, [*short, f"output={tmp_path / 'one'}"]), baseline=False)
    parts = load_recipe(ground, [*short, f"output={tmp_path / 'two'}"])
    with workspace.stopped_at(4), pytest.raises(Interrupted):
        train(parts, baseline=False)
    with pytest.raises(ScaloraError, match="quantization is 'none', but 'nf4'"):
        train(parts.model_copy(update={"quantization": "none"}), resume=True)
    resumed = train(parts, resume=True, baseline=False)
    assert torch.equal(exports.logits(resumed.loading), exports.logits(straight.loading))
    assert resumed.metrics["after"] == straight.metrics["after"]


def test_loftq_starts_nearer_to_the_float_model(ground):
    _needs("nf4")
    starts = {}
    for name in ("lora", "loftq"):
        recipe = load_recipe(ground, ["quantization=nf4", f"method={name}", "method.rank=16"])
        loaded = load_inputs(recipe)
        starts[name] = _logits(build_method(recipe.method).adapt(loaded.model, "causal-lm").model)
    exact = _logits(LlamaForCausalLM.from_pretrained(recipe.model))
    assert (starts["loftq"] - exact).norm() < 0.8 * (starts["lora"] - exact).norm()
    recipe = load_recipe(ground, ["quantization=nf4", "method=loftq", "method.options={steps: 3}"])
    loaded, loftq = load_inputs(recipe), build_method(recipe.method)
    with pytest.raises(ScaloraError, match=r"steps is 3.*nf4-rounded"):
        loftq.adapt(loaded.model, "causal-lm")


def test_the_fingerprint_is_that_of_the_float_base_and_of_no_other_kind(ground):
    _needs("nf4")
    _needs("int8")
    prints = {
        Inputs.of(load_inputs(load_recipe(ground, ["method=lora", f"quantization={each}"]))).base_model
        for each in ("none", "nf4-rounded", "nf4", "int8")
    }
    assert len(prints) == 4


def test_rows_that_bitsandbytes_mixes_up_are_refused(tmp_path):
    _needs("nf4")
    recipe = load_recipe(exports.lay(tmp_path), ["quantization=nf4", "method=lora"])  # 16 inputs
    with pytest.raises(ScaloraError, match=r"quantization is 'nf4'.*16 inputs.*nf4-rounded"):
        made_ready(load_inputs(recipe), None)


@pytest.mark.parametrize("quantization", LIBRARIES)
def test_without_the_library_there_is_one_message(quantization, ground, monkeypatch):
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    way_out = "nf4-rounded" if quantization == "nf4" else "none"
    with pytest.raises(ScaloraError, match=rf"is '{quantization}'.*needs {LIBRARIES[quantization]}.*{way_out}"):
        load_inputs(load_recipe(ground, [f"quantization={quantization}", "method=lora"]))


@pytest.mark.parametrize(
    ("quantization", "name", "possible"),
    [("nf4", "full", "nf4-rounded"), ("int8", "dora", "nf4 or nf4-rounded"), ("nf4", "peft:LOHA", "nf4-rounded"),
     ("float8", "loftq", "nf4 or nf4-rounded"), ("nf4", "pissa", "nf4-rounded")],
)  # fmt: skip
def test_methods_that_need_floats_are_refused(quantization, name, possible, ground):
    with pytest.raises(ScaloraError, match=f"'{name}' cannot train: set quantization: {possible},"):
        load_inputs(load_recipe(ground, [f"quantization={quantization}", f"method={name}"]))


def test_what_is_packed_is_not_added_to(ground):
    method = "method={name: scalora-i, options: {accumulate: base}}"
    with pytest.raises(ScaloraError, match=r"accumulate is 'base', but quantization 'nf4' packs the base.*adapter"):
        load_inputs(load_recipe(ground, ["quantization=nf4", method]))


def test_the_former_name_of_the_field(ground):
    with pytest.raises(ScaloraError, match="base_weights is called quantization now"):
        load_recipe(ground, ["base_weights=nf4"])


def test_a_run_of_the_former_name_resumes_and_exports(ground, tmp_path):
    """Its folder's recipe and note are as they were written then."""
    recipe = load_recipe(ground, ["quantization=nf4-rounded", "method=lora", f"output={tmp_path / 'run'}"])
    with workspace.stopped_at(4), pytest.raises(Interrupted):
        train(recipe, baseline=False)
    file = tmp_path / "run" / "recipe.yaml"
    file.write_text(file.read_text().replace("quantization: nf4-rounded", "base_weights: nf4"))
    run = train(recipe, resume=True, baseline=False)
    file.write_text(file.read_text().replace("quantization: nf4-rounded", "base_weights: nf4"))
    adapter = run.folder / "adapter"
    expected = _logits(scalora.load(run.folder))
    (adapter / QUANTISED_BASE).rename(adapter / FORMER_NF4_BASE)
    assert torch.equal(_logits(scalora.load(adapter)), expected)
    merged = export(run.folder, to="merged", output=tmp_path / "merged").folder
    torch.testing.assert_close(_logits(scalora.load(merged)), expected, rtol=0, atol=1e-4)
