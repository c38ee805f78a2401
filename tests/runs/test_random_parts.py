"""Runs, loads and exports of models whose poolers start at random, whose configuration is overridden, or whose labels
are stale."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5Model,
)

import scalora
from helpers import exports, tokenized, workspace
from scalora import ScaloraError
from scalora.common.quiet import quiet
from scalora.runs.export.export import export
from scalora.runs.recipe import load_recipe
from scalora.tasks import build_task

SIZES = {
    "vocab_size": tokenized.SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "initializer_range": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    quiet()
    folder = tmp_path_factory.mktemp("laid")
    exports.lay(folder)
    torch.manual_seed(0)
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    stale = {"id2label": {0: "mat", 1: "cat"}, "label2id": {"mat": 0, "cat": 1}}
    for name, model in (
        ("mlm", BertForMaskedLM(BertConfig(**SIZES))),
        ("t5", T5Model(T5Config(vocab_size=tokenized.SIZE, **t5, eos_token_id=2))),
        (
            "stale",
            BertForSequenceClassification(BertConfig(**SIZES, **stale, problem_type="multi_label_classification")),
        ),
    ):
        model.save_pretrained(folder / name)
        tokenized.tokenizer().save_pretrained(folder / name)
    return folder


def _run(folder, model, name, *overrides):
    classify = workspace.classification(folder)[0]
    return exports.run(
        folder / "recipe.yaml", name, classify, f"model={folder / model}", "method.options={}", *overrides
    )


def _score(run, model, seed=0):
    torch.manual_seed(seed)
    recipe = load_recipe(run.folder / "recipe.yaml")
    return build_task(recipe.task).score(model, tokenized.tokenizer()).metrics


@pytest.mark.parametrize("method", ["lora", "scalora", "full", "mora"])
def test_a_random_pooler_is_part_of_what_is_saved(laid, method):
    run = _run(laid, "mlm", f"pool-{method}", f"method.name={method}", "method.target_modules=[query, value]")
    after = run.metrics["after"]
    names = {}
    for seed in (1, 2):  # plain transformers and PEFT draw another pooler each time
        torch.manual_seed(seed)
        exec("\n".join(run.loading), names)
        assert _score(run, names["model"]) == pytest.approx(after, abs=1e-5)
    assert _score(run, scalora.load(run.folder)) == pytest.approx(after, abs=1e-5)
    for form in ("lora", "merged", "delta"):
        if form == "lora" and method in ("full", "mora"):
            continue
        done = export(run.folder, to=form)
        assert _score(run, scalora.load(done.folder), 3) == pytest.approx(after, abs=1e-5)


def test_an_adapter_whose_pooler_was_frozen_at_random_is_lost(laid, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(laid / "mlm")
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    for use in (scalora.load, lambda path: export(path, to="merged")):
        with pytest.raises(ScaloraError, match=r"does not hold bert\.pooler\.dense\.bias.*modules_to_save"):
            use(tmp_path / "adapter")


def test_a_classifier_of_an_encoder_and_decoder_is_exported(laid):
    text = "task.text='{text} <eos>'"
    run = _run(laid, "t5", "t5-run", "method.name=lora", text)
    for form in ("lora", "merged", "delta"):
        done = export(run.folder, to=form)
        assert _score(run, scalora.load(done.folder)) == pytest.approx(run.metrics["after"], abs=1e-5)


def test_a_rate_for_the_head_is_for_all_that_starts_at_random(laid):
    poolers = {}
    for rate in ("1e-9", "1e-2"):
        run = _run(laid, "mlm", f"rate-{rate}", "method.name=full", f"head_learning_rate={rate}")
        poolers[rate] = AutoModelForSequenceClassification.from_pretrained(run.folder / "adapter").bert.pooler.dense
    assert (poolers["1e-9"].weight - poolers["1e-2"].weight).abs().max() > 5e-3


CHANGED = {"hidden_act": "relu", "num_hidden_layers": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}


@pytest.mark.parametrize("name", CHANGED)
def test_values_that_change_the_function_go_with_the_adapter(laid, name):
    change = f"config={json.dumps({name: CHANGED[name]})}"
    run = exports.run(laid / "recipe.yaml", f"changed-{name}", change, "method=lora", "method.options={}")
    names = {}
    exec("\n".join(run.loading), names)
    assert _score(run, names["model"]) == pytest.approx(run.metrics["after"], abs=1e-5)
    assert f"{name}={CHANGED[name]!r}" in (run.folder / "adapter" / "README.md").read_text()
    for form in ("lora", "delta"):  # others would put it on the base without the value
        with pytest.raises(ScaloraError, match=f"other values than its own.*{name}.*use --to merged"):
            export(run.folder, to=form)
    merged = AutoModelForCausalLM.from_pretrained(export(run.folder, to="merged").folder)
    assert _score(run, merged) == pytest.approx(run.metrics["after"], abs=1e-5)


def test_values_that_change_training_alone_are_no_matter(laid):
    run = _run(laid, "bert", "dropout", "method.name=lora", "config={hidden_dropout_prob: 0.3, hidden_act: gelu}")
    assert "hidden_" not in "".join(run.loading)
    export(run.folder, to="lora")


def test_an_adapter_with_layers_of_its_own_knows_its_base_without_its_run(laid, tmp_path):
    run = _run(laid, "bert", "tanh", "method.name=mora", "config={hidden_act: tanh}")
    (run.folder / "adapter").rename(tmp_path / "moved")
    assert _score(run, scalora.load(tmp_path / "moved")) == pytest.approx(run.metrics["after"], abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_classes_are_called_as_the_task_calls_them(laid, tmp_path, method):
    data = tmp_path / "named.jsonl"
    rows = [json.loads(line) for line in (laid / "data.jsonl").read_text().splitlines()]
    tokenized.write_jsonl(data, [{**row, "label": "mat" if row["label"] else "cat"} for row in rows])
    run = _run(laid, "stale", f"stale-{method}", f"method.name={method}", f"task.data.train={data}")
    wanted = {0: "cat", 1: "mat"}
    names = {}
    exec("\n".join(run.loading), names)
    found = [names["model"], scalora.load(run.folder), scalora.load(run.folder / "checkpoints" / "checkpoint-4")]
    found += [scalora.load(export(run.folder, to=form).folder) for form in ("merged", "delta")]
    if method == "lora":
        exported = export(run.folder, to="lora").folder
        for folder in (exported, run.folder / "adapter"):  # an adapter itself has no place for names
            lines = (folder / "README.md").read_text().split("```")[1].removeprefix("python")
            exec(lines.replace("path/to/this/folder", str(folder)), names)
            found.append(names["model"])
        found.append(scalora.load(exported))
    data.unlink()  # a run remembers its classes
    found.append(scalora.load(run.folder))
    for model in found:
        assert model.config.id2label == wanted
        assert model.config.problem_type == "single_label_classification"
