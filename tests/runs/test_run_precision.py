"""Which precision a run computes in, for every kind of device, and what keeps it over a resume."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from helpers import workspace
from scalora import ScaloraError
from scalora.runs import precision
from scalora.runs.folder import saved_precision
from scalora.runs.precision import Device, PrecisionChoice, choose, decide, find_device
from scalora.runs.recipe import load_recipe
from scalora.runs.stored import of_today
from scalora.runs.training import Watcher, train

BF16, OTHER = PrecisionChoice("bfloat16", "as a test says"), PrecisionChoice("float32", "as a test says")


@pytest.mark.parametrize(
    ("device", "chosen", "words"),
    [
        (Device("cpu", native_bf16=True), "bfloat16", "this CPU computes bf16 natively"),
        (Device("cpu", native_bf16=False), "float32", "this CPU has no native bf16"),
        (Device("cuda", native_bf16=True), "bfloat16", "this GPU computes bf16 natively"),
        (Device("cuda", native_bf16=False), "float32", "this GPU has no native bf16"),
        (Device("xpu", native_bf16=True), "bfloat16", "this GPU"),
        (Device("mps", native_bf16=True), "float32", "untried"),
    ],
)
def test_the_fastest_that_does_not_lose_the_run(device, chosen, words):
    assert choose(device).precision == chosen
    assert words in choose(device).reason


def test_orders_come_before_what_is_continued_and_that_before_the_device(monkeypatch):
    monkeypatch.setattr(precision, "find_device", lambda cpu: Device("cpu" if cpu else "cuda", native_bf16=not cpu))
    assert decide("float16", {}, "bfloat16").precision == "float16"
    assert decide("auto", {}, "float16").precision == "float16"
    assert decide("auto", {}).precision == "bfloat16"
    assert decide("auto", {"use_cpu": True}).precision == "float32"


CPUS = {
    "AVX2": ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
    "AVX-512": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, False),  # torch says that it supports bf16, and is slow
    "this": ({"ONEDNN_MAX_CPU_ISA": "ALL"}, None),
}


@pytest.mark.parametrize("name", CPUS)
def test_what_onednn_is_told_counts(name):
    code = "import torch; from scalora.runs.precision import find_device; print(find_device(cpu=True).native_bf16)"
    told, expected = CPUS[name]
    if expected is None:
        expected = find_device(cpu=True).native_bf16 if "ONEDNN_MAX_CPU_ISA" not in os.environ else None
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **told}, capture_output=True, text=True, check=True
    )
    assert expected is None or done.stdout.strip() == str(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "auto"),
        (["training.bf16=true"], "bfloat16"),
        (["training.fp16=true"], "float16"),
        (["training.fp16=true", "training.bf16=false"], "float16"),
        (["training.bf16=false"], "float32"),
        (["training.fp16=false"], "auto"),
        (["training.bf16=true", "precision=bfloat16"], "bfloat16"),
        (["training.bf16=false", "precision=float16"], "float16"),
    ],
)
def test_flags_of_the_training_arguments_are_orders(tmp_path, overrides, expected):
    recipe = load_recipe(_auto(tmp_path), overrides)
    assert recipe.precision == expected
    assert not {"bf16", "fp16"} & recipe.training.keys()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["precision=float32", "training.bf16=true"], r"precision is 'float32', but training\.bf16 is True"),
        (["precision=bfloat16", "training.bf16=false"], r"precision is 'bfloat16', but training\.bf16 is False"),
        (["training.fp16=true", "training.bf16=true"], r"precision is 'bfloat16', but training\.fp16 is True"),
        (["precision=float8"], r"precision.* is 'float8'"),
    ],
)
def test_contradictions_are_refused(tmp_path, overrides, words):
    with pytest.raises(ScaloraError, match=words):
        load_recipe(_auto(tmp_path), overrides)


def test_stored_recipes_without_the_field_computed_in_what_their_flags_say():
    assert of_today({"training": {"bf16": True}})["precision"] == "bfloat16"
    assert of_today({"training": {"fp16": True, "bf16": False}})["precision"] == "float16"
    assert of_today({"training": {}})["precision"] == "float32"
    assert of_today({"precision": "float16", "training": {}})["precision"] == "float16"


class _Said(Watcher):
    def __init__(self):
        self.lines, self.products = [], set()

    def say(self, text):
        self.lines.append(text)

    def progress(self, done, total):
        self.products.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))


def test_a_run_says_records_and_keeps_its_precision(tmp_path, monkeypatch):
    path, folder = _auto(tmp_path), tmp_path / "run"
    monkeypatch.setattr(precision, "choose", lambda device: BF16)
    said = _Said()
    train(load_recipe(path), watcher=said)
    assert said.lines == [f"precision: {BF16}"]
    assert said.products == {torch.bfloat16}
    assert json.loads((folder / "metrics.json").read_text())["precision"] == BF16._asdict()

    (folder / "metrics.json").unlink()
    monkeypatch.setattr(precision, "choose", lambda device: OTHER)  # the run goes on another machine
    with pytest.raises(ScaloraError, match="precision is 'float32', but 'bfloat16' in the run"):
        train(load_recipe(path, ["precision=float32"]), resume=True)
    resumed = train(load_recipe(path), resume=True)
    assert resumed.metrics["precision"]["precision"] == "bfloat16"


def test_a_run_of_the_version_before_goes_on_as_it_began(tmp_path, monkeypatch):
    path, folder = _auto(tmp_path), tmp_path / "run"
    train(load_recipe(path, ["training.bf16=true"]))
    (folder / "metrics.json").unlink()
    saved = yaml.safe_load((folder / "recipe.yaml").read_text())
    saved["training"]["bf16"] = saved.pop("precision") == "bfloat16"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(saved))
    monkeypatch.setattr(precision, "choose", lambda device: OTHER)
    assert train(load_recipe(path), resume=True).metrics["precision"]["precision"] == "bfloat16"


@pytest.mark.parametrize("overrides", [[], ["precision=auto"], ["precision=float32"], ["precision=bfloat16"]])
def test_a_run_whose_recipe_lost_its_precision_is_not_guessed_at(begun, overrides):
    """It was bfloat16; what is left reads like a recipe of the version before, which computed in float32."""
    path, folder = begun
    with pytest.raises(ScaloraError, match=r"recipe\.yaml has no precision, .*put the line back"):
        train(load_recipe(path, overrides), resume=True)
    assert "precision" not in (folder / "recipe.yaml").read_text()


def test_a_run_whose_recipe_has_a_key_twice_is_not_resumed(begun):
    _, folder = begun
    text = (folder / "recipe.yaml").read_text()
    (folder / "twice").mkdir()
    (folder / "twice" / "recipe.yaml").write_text(f"precision: bfloat16\n{text}precision: float32\n")
    with pytest.raises(ScaloraError, match="is not the recipe that the run wrote"):
        saved_precision(folder / "twice")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run in bfloat16 that stopped, and lost a line of its recipe."""
    place = tmp_path_factory.mktemp("begun")
    path, folder = _auto(place), place / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "choose", lambda device: BF16)
        train(load_recipe(path))
    (folder / "metrics.json").unlink()
    saved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert saved.pop("precision") == "bfloat16"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(saved))
    return path, folder


def _auto(folder):
    """The recipe that leaves its precision to the device."""
    path = workspace.lay(folder)
    recipe = yaml.safe_load(path.read_text())
    del recipe["precision"]
    path.write_text(yaml.safe_dump(recipe))
    return path
