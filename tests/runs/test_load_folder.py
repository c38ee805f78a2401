"""`scalora.load`: everything that is saved comes back with one call, and computes what was trained."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import scalora
from helpers import exports, models, tokenized, workspace
from scalora import ScaLoraConfig, ScaloraError
from scalora.common.quiet import quiet
from scalora.runs.export.export import export
from scalora.runs.recipe import load_recipe

# name: overrides of the recipe; every run leaves checkpoints at steps 2 and 4, and the adapter of step 4.
RUNS = {
    "scalora": ["method.options={interval: 1}"],
    "base": ["method.options={interval: 1, accumulate: base}"],
    "bert": ["bert"],
    "hira": ["method=hira"],
    "mora": ["method=mora"],
    "alpha": ["method=alpha-lora", "method.options={batch: 4}"],
    "full": ["bert", "method=full"],
}
NO_CHECKPOINT = {"mora", "alpha"}  # only the finished run of a method with layers of its own can be restored


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Gives a run by its name, trained at the first call, and the logits that its printed lines lead to."""
    quiet()
    folder = tmp_path_factory.mktemp("laid")
    recipe = exports.lay(folder)

    @cache
    def train(name):
        bert = workspace.classification(folder) if "bert" in RUNS[name] else []
        run = exports.run(recipe, f"run-{name}", *bert, *(each for each in RUNS[name] if each != "bert"))
        return run, exports.logits(run.loading)

    return train


def _logits(model):
    with torch.no_grad():
        return model.float()(input_ids=exports.IDS).logits


@pytest.mark.parametrize("name", RUNS)
def test_a_run_its_adapter_its_checkpoint_and_its_exports(trained, tmp_path, name):
    run, logits = trained(name)
    paths = [run.folder, run.folder / "adapter"]
    if name not in NO_CHECKPOINT:
        paths.append(run.folder / "checkpoints" / "checkpoint-4")
    paths += [export(run.folder, to=form, output=tmp_path / form).folder for form in ("merged", "delta")]
    for path in paths:
        model = scalora.load(path)
        assert not model.training
        torch.testing.assert_close(_logits(model), logits, rtol=0, atol=1e-4, msg=str(path))


def test_an_unfinished_run_gives_its_newest_checkpoint(trained, tmp_path):
    run, logits = trained("scalora")
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    torch.testing.assert_close(_logits(scalora.load(tmp_path / "run")), logits, rtol=0, atol=1e-5)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    assert not torch.equal(_logits(scalora.load(tmp_path / "run")), logits)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_adapter_from_someones_own_loop_needs_no_tokenizer(tmp_path, kind):
    models.base(kind).save_pretrained(tmp_path / "base")
    model = models.lora(kind)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    models.train(model, optimizer, kind, 4)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ScaloraError, match="names its base model"):
        scalora.load(tmp_path / "adapter")
    loaded = scalora.load(tmp_path / "adapter", base=str(tmp_path / "base"))
    torch.testing.assert_close(models.logits(loaded, kind), models.logits(model, kind), rtol=0, atol=1e-5)
    done = export(tmp_path / "adapter", to="delta", base=str(tmp_path / "base")) if kind == "bert" else None
    if done:  # nothing but the saved head tells that it is a classifier
        torch.testing.assert_close(
            models.logits(scalora.load(done.folder), kind), models.logits(model, kind), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_a_checkpoint_of_someones_own_trainer(tmp_path, accumulate):
    """It is loaded, merged and exported on the base that it was trained on, and on no other."""
    models.base("llama").save_pretrained(tmp_path / "base")
    tokenized.tokenizer().save_pretrained(tmp_path / "base")
    model = models.lora("llama")
    rows = [{"input_ids": row, "labels": row} for row in models.batch("llama")["input_ids"]]
    options = {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=4, save_steps=4, **options)
    callback = scalora.ScaLoraCallback(ScaLoraConfig(interval=1, accumulate=accumulate))
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    checkpoint, base, expected = tmp_path / "out" / "checkpoint-4", tmp_path / "base", models.logits(model, "llama")

    def same(other):
        torch.testing.assert_close(models.logits(other.float(), "llama"), expected, rtol=0, atol=1e-5)

    same(scalora.load(checkpoint, base=base))
    same(scalora.load(checkpoint, base=base).merge_and_unload())
    for form in ("merged", "delta"):
        done = export(checkpoint, to=form, base=str(base), output=tmp_path / form)
        same(scalora.load(done.folder, base=base if form == "delta" else None))

    other = models.base("llama")
    with torch.no_grad():
        other.model.layers[0].input_layernorm.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    tokenized.tokenizer().save_pretrained(tmp_path / "other")
    for use in (scalora.load, lambda path, base: export(path, to="merged", base=str(base), output=tmp_path / "no")):
        with pytest.raises(ScaloraError, match="weights are others than those of the training"):
            use(checkpoint, base=tmp_path / "other")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_loaded_is_named(trained, tmp_path):
    with pytest.raises(ScaloraError, match="there is no"):
        scalora.load(tmp_path / "nothing")
    with pytest.raises(ScaloraError, match="path is None"):
        scalora.load(None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ScaloraError, match="no model that transformers can load"):
        scalora.load(tmp_path)
    run, _ = trained("mora")
    with pytest.raises(ScaloraError, match="checkpoints of mora cannot be restored"):
        scalora.load(run.folder / "checkpoints" / "checkpoint-4")


def test_without_the_extra_it_says_what_to_install():
    code = """
import sys
sys.modules["pydantic"] = None
import scalora
try:
    scalora.load("anything")
except scalora.ScaloraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "scalora.load needs pydantic: pip install 'scalora[cli]'\n"


def test_an_adapter_without_task_type_is_for_the_class_it_was_made_for(tmp_path):
    models.base("bert").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    model = get_peft_model(base, lora)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(models.logits(scalora.load(tmp_path / "adapter"), "bert"), models.logits(model, "bert"))


@pytest.mark.parametrize("method", ["scalora-i", "mora"])
def test_a_base_by_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch, method):
    recipe = exports.lay(tmp_path)
    monkeypatch.chdir(tmp_path)
    base = Path(load_recipe(recipe).model)
    run = exports.run(recipe, f"run-{method}", f"model={os.path.relpath(base)}", f"method={method}")
    assert not Path(os.path.relpath(base)).is_absolute()
    made = export(run.folder, to="merged" if method == "mora" else "lora", output=tmp_path / "made").folder
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for path in (run.folder, run.folder / "adapter", made):
        scalora.load(tmp_path / path)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(ScaloraError, match=r"the base model is named '.*' in '.*': where it has moved, .*name it with"):
        scalora.load(tmp_path / run.folder)
    scalora.load(tmp_path / run.folder, base=tmp_path / "moved")
