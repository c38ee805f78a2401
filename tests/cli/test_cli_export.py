"""`scalora export` and `scalora inspect` as a stranger uses them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from helpers import workspace
from scalora.cli import app
from scalora.common.quiet import quiet
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train


def _invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    """Models, data, recipe and a finished run of eight steps."""
    quiet()
    folder = tmp_path_factory.mktemp("ground")
    train(load_recipe(workspace.lay(folder)))
    return folder


def test_export_prints_what_was_kept_what_it_costs_and_where_it_is(laid, tmp_path):
    result = _invoke("export", laid / "run", "--to", "lora", "--rank", "2", "--output", tmp_path / "small")
    assert result.exit_code == 0, result.output
    for words in ("q_proj", "least energy", "logits differ by at most", "loss ", "20 test examples", "small"):
        assert words in result.output
    assert (tmp_path / "small" / "adapter_model.safetensors").is_file()
    result = _invoke("export", laid / "run", "--output", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    assert "rank 8, exact" in result.output
    result = _invoke("export", tmp_path / "plain", "--to", "merged")
    assert result.exit_code == 0, result.output
    assert "no loss: there is no recipe.yaml" in result.output
    assert (tmp_path / "plain-merged" / "tokenizer.json").is_file()


BAD = {
    "wrong path": (["nowhere"], "there is no 'nowhere'"),
    "a file": (["FOLDER/recipe.yaml"], "is a file: give the folder"),
    "empty folder": (["FOLDER/empty"], "holds no adapter_config.json"),
    "folder of checkpoints": (["FOLDER/run/checkpoints"], "did you mean"),
    "base model": (["FOLDER/llama", "--to", "lora"], "its weights themselves"),
    "rank 0": (["RUN", "--rank", "0"], "rank is 0"),
    "rank below 0": (["RUN", "--rank", "-3"], "rank is -3"),
    "rank too large": (["RUN", "--rank", "9"], "choose 8 or less"),
    "energy 1.5": (["RUN", "--energy", "1.5"], "energy is 1.5"),
    "energy nan": (["RUN", "--energy", "nan"], "energy is nan"),
    "both": (["RUN", "--rank", "2", "--energy", "0.9"], "give one of the two"),
    "rank of merged": (["RUN", "--to", "merged", "--rank", "2"], "for lora only"),
    "unknown form": (["RUN", "--to", "gguf"], "choose one of lora, merged, delta"),
    "examples": (["RUN", "--examples", "-1"], "examples is -1"),
    "output exists": (["RUN", "--output", "FOLDER/llama"], "is not empty"),
    "output is no export": (["RUN", "--output", "FOLDER/llama", "--overwrite"], "no earlier export"),
    "output is the run": (["RUN", "--output", "RUN", "--overwrite"], "no earlier export"),
    "output is a file": (["RUN", "--output", "FOLDER/data.jsonl"], "is not empty"),
    "output under a file": (["RUN", "--output", "FOLDER/data.jsonl/x"], "cannot be written"),
    "read-only output": (["RUN", "--output", "/proc/out"], "cannot be written"),
    "name too long": (["RUN", "--output", f"FOLDER/{'x' * 300}"], "cannot be written"),
    "missing base": (["RUN", "--base", "./nowhere"], "--base"),
    "base of another kind": (["RUN", "--base", "FOLDER/bert"], "cannot be a causal-lm model"),
    "truncated weights": (["FOLDER/cut"], "adapter_model.safetensors cannot be read"),
    "garbled weights": (["FOLDER/garbled"], "adapter_model.safetensors cannot be read"),
    "damaged recipe": (["FOLDER/half"], "recipe.yaml"),
    "run without result": (["FOLDER/young"], "neither an adapter nor a checkpoint"),
}


@pytest.fixture(scope="module")
def broken(laid):
    for name in ("cut", "garbled"):
        shutil.copytree(laid / "run" / "adapter", laid / name)
    weights = laid / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (laid / "garbled" / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    (laid / "empty").mkdir()
    for name, text in (("half", "model: x"), ("young", (laid / "run" / "recipe.yaml").read_text())):
        (laid / name).mkdir()
        (laid / name / "recipe.yaml").write_text(text)
    shutil.copytree(laid / "run" / "adapter", laid / "half" / "adapter")
    return laid


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message_and_exit_code_2(broken, case):
    arguments, words = BAD[case]
    before = sorted(str(p) for p in broken.rglob("*"))
    filled = [a.replace("RUN", str(broken / "run")).replace("FOLDER", str(broken)) for a in arguments]
    result = _invoke("export", *filled)
    assert result.exit_code == 2, (result.output, result.exception)
    assert words in result.stderr
    assert result.stderr.count("error:") == 1
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert sorted(str(p) for p in broken.rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize("case", [name for name, (arguments, _) in BAD.items() if len(arguments) == 1])
def test_inspect_refuses_the_same_folders(broken, case):
    arguments, words = BAD[case]
    result = _invoke("inspect", arguments[0].replace("FOLDER", str(broken)))
    assert result.exit_code == 2, (result.output, result.exception)
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_half_written(laid, tmp_path, signal_):
    # Sleeps in the middle of writing, so that the signal comes before the end.
    code = "import time, scalora.runs.export.export as e; e.write_plain_lora = lambda *_, **__: time.sleep(60)\n"
    code += "from scalora.__main__ import main; main()"
    command = [sys.executable, "-c", code, "export", str(laid / "run"), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal_)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.strip() == "stopped"
    assert not list(tmp_path.iterdir())


def test_inspect_tells_ranks_energies_sizes_and_origin(laid, tmp_path):
    result = _invoke("inspect", laid / "run")
    assert result.exit_code == 0, result.output
    for words in (
        "run, finished", "scalora-i (interval=2", "accuracy", "→", "checkpoint-8 (", "torch", "effective rank",
        "accumulated share", str(laid / "llama"), "multiple_choice",
    ):  # fmt: skip
        assert words in result.output
    report = json.loads(_invoke("inspect", laid / "run", "--json").output)
    metrics = json.loads((laid / "run" / "metrics.json").read_text())
    assert report["base_fingerprint"] == metrics["base_fingerprint"]
    assert report["scores"]["after"] == metrics["after"]
    assert report["steps"] == 8
    assert report["bytes"] == metrics["adapter_bytes"]
    assert len(report["layers"]) == 14
    assert {layer["columns"] for layer in report["layers"]} == {2 + 6}
    assert all(layer["accumulated"] > 0 for layer in report["layers"])

    early = json.loads(_invoke("inspect", laid / "run" / "checkpoints" / "checkpoint-4", "--json").output)
    assert early["steps"] == 4
    assert early["scores"] is None  # those of the run's end are not its own
    assert early["last_log"]["step"] == 4

    for form, kind in (("lora", "plain LoRA"), ("merged", "whole model"), ("delta", "dense difference")):
        assert _invoke("export", laid / "run", "--to", form, "--output", tmp_path / form).exit_code == 0
        result = _invoke("inspect", tmp_path / form)
        assert result.exit_code == 0, result.output
        assert f"export: {kind}" in result.output
        assert metrics["base_fingerprint"] in result.output
        assert "accuracy" in result.output
    several = json.loads(_invoke("inspect", laid / "run", tmp_path / "lora", "--json").output)
    assert [each["path"] for each in several] == [str(laid / "run"), str(tmp_path / "lora")]
    shown = _invoke("inspect", laid / "run", tmp_path / "lora").output
    assert all(words in shown for words in ("run, finished", "export: plain LoRA"))
    result = _invoke("inspect", laid / "llama")
    assert result.exit_code == 0, result.output
    assert "folder: whole model" in result.output
