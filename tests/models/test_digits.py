"""The dense network and its digits: made on the spot, the same every time, and a model like any other."""

import json
from pathlib import Path

import pytest
import torch

import scalora
from helpers import training
from scalora import ScaloraError
from scalora.methods import all_methods
from scalora.models import digits as dense
from scalora.models.load import load_model
from scalora.runs.recipe import parse_recipe
from scalora.runs.training import train

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _recipe(folder, **changes):
    content = {
        "model": "digits-mlp",
        "precision": "float32",
        "task": {
            "kind": "vectors", "features": "pixels", "metric": "nll",
            "data": {"train": "digits-turned", "train_size": 256, "validation_size": 40, "test_size": 200},
        },
        "method": {"name": "lora", "rank": 2, "target_modules": ["layers.0", "layers.1"]},
        "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 64, "max_steps": 40},
        "output": str(folder / "run"),
    }  # fmt: skip
    return parse_recipe({**content, **changes})


def test_the_network_knows_upright_digits_and_no_turned_ones(cache):
    model, tokenizer = load_model("digits-mlp", head="sequence-classification", num_labels=10)
    assert tokenizer is None
    for name, low, high in (("digits", 0.9, 1.0), ("digits-turned", 0.0, 0.3)):
        rows = dense.digit_rows(name)
        assert len(rows) == 1797
        logits = model(torch.tensor([row["pixels"] for row in rows])).logits
        accuracy = (logits.argmax(-1) == torch.tensor([row["label"] for row in rows])).float().mean()
        assert low <= accuracy <= high


def test_the_network_is_the_one_that_the_results_were_obtained_on(cache):
    """Anything else under this name needs new results (and another name in the cache)."""
    model = dense.DenseClassifier.from_pretrained(dense.digits_mlp())
    committed = json.loads((Path(__file__).parents[2] / "benchmarks/results/digits/results.json").read_text())
    full = next(t for t in committed["trials"] if t["contender"] == "full@2" and "parameters" in t)
    assert sum(p.numel() for p in model.parameters()) == full["parameters"] == 26_122


def test_it_is_made_once_and_the_same_every_time(cache, tmp_path, monkeypatch):
    first = dense.digits_mlp()
    stamp = (first / "config.json").stat().st_mtime_ns
    assert dense.digits_mlp() == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    monkeypatch.setenv("SCALORA_CACHE", str(tmp_path))
    assert (dense.digits_mlp() / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_method_trains_and_saves_it(cache, tmp_path, name):
    method = {"name": name, "rank": 2, "target_modules": ["layers.0", "layers.1"]}
    base = {"quantization": "nf4-rounded"} if name == "loftq" else {}
    result = train(_recipe(tmp_path, method=method, **base), baseline=True)
    assert result.after.metrics["nll"] < result.before.metrics["nll"]
    assert result.after.primary == "nll"
    assert result.loading[0] == "import scalora.models.digits"
    x = torch.tensor([row["pixels"] for row in dense.digit_rows("digits")[:9]])
    printed, loaded = training.run_lines(result.loading), scalora.load(result.folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs_embeds=x).logits, printed(inputs_embeds=x).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "vectors", "features": "pixel"}, "did you mean 'pixels'"),
        ({"kind": "vectors", "features": "label"}, "lists of numbers"),
        ({"kind": "vectors", "features": "pixels", "label": "pixels"}, "task.label"),
        ({"kind": "classification", "text": "{label}"}, "reads vectors"),
    ],
)
def test_bad_input_is_named(cache, tmp_path, changes, words):
    task = {**changes, "data": {"train": "digits", "test_size": 5}}
    with pytest.raises(ScaloraError, match=words):
        train(_recipe(tmp_path, task=task))


@pytest.mark.parametrize(
    ("row", "words"), [({"pixels": [0.0] * 3}, "has 3 numbers in .*, row 6, but the network reads 64"), ({}, "has 10")]
)
def test_vectors_and_labels_that_the_network_is_not_made_for(cache, tmp_path, row, words):
    rows = [{"pixels": [i / 9] * 64, "label": i % 5 if row else i} for i in range(12)]
    rows[5] |= row
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = {"train": str(tmp_path / "rows.json"), "test": str(tmp_path / "rows.json")}
    with pytest.raises(ScaloraError, match=words):
        train(_recipe(tmp_path, task={"kind": "vectors", "features": "pixels", "data": data}))
