"""The command as a stranger uses it: help, good runs, and one clear message with exit code 2 for everything else."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from helpers import workspace
from scalora.cli import app
from scalora.cli.train import worse_sentence


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ground")
    return folder, workspace.lay(folder)


def _invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_says_what_there_is():
    for arguments, words in (
        (["--help"], ("train", "doctor", "methods")),
        (["train", "--help"], ("RECIPE.yaml", "--set", "--resume")),
    ):
        result = _invoke(*arguments)
        assert result.exit_code == 0
        assert all(word in result.output for word in words)


def test_train_ends_with_a_table_and_lines_that_load_the_result(laid, tmp_path):
    result = _invoke("train", laid[1], "--set", f"output={tmp_path / 'run'}")
    assert result.exit_code == 0, result.output
    for words in (
        "before",
        "after",
        "accuracy",
        "trainable parameters",
        "rank of the accumulated update",
        "from_pretrained",
    ):
        assert words in result.output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 8


def test_brackets_of_data_and_paths_are_shown_as_they_are(laid, tmp_path, monkeypatch):
    options = ["training.max_steps=1", "task.prompt='[INST] {text} [/INST] :x:'", f"output={tmp_path / '[b]run'}"]
    result = _invoke("train", laid[1], *(word for each in options for word in ("--set", each)))
    assert result.exit_code == 0, result.output
    shown = "".join(result.output.split())
    assert "[b]run/adapter" in shown
    assert "[/INST]" in shown
    monkeypatch.chdir(tmp_path)
    result = _invoke("inspect", "[b]run")
    assert result.exit_code == 0
    assert "[b]run/adapter" in result.output


def test_train_and_compare_say_what_becomes_of_repeated_rows(laid, tmp_path):
    folder, recipe = laid
    text = (folder / "data.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(text * 2)
    common = [str(recipe), "--set", f"task.data.train={tmp_path / 'twice.jsonl'}", "--set", "training.max_steps=1"]
    words = "task.data.train: 60 of 120 rows say the same as others"
    result = _invoke("train", *common, "--set", f"output={tmp_path / 'run'}")
    assert result.exit_code == 0, result.output
    assert result.output.count(words) == 1
    few = ["--set", "task.data.validation_size=10", "--seeds", "1", "--lr", "1e-3", "--no-curve", "--methods", "lora"]
    result = _invoke("compare", *common, *few, "--output", str(tmp_path / "arena"))
    assert result.exit_code == 0, result.output
    assert result.output.count(words) == 1


def test_methods_and_doctor():
    result = _invoke("methods")
    assert result.exit_code == 0
    assert "scalora-i" in result.output
    result = _invoke("doctor")
    assert result.exit_code == 0
    assert all(word in result.output for word in ("torch", "cpu", "model hub", "smollm2-135m-instruct"))


BAD = {
    "missing recipe": (["nowhere.yaml"], "nowhere.yaml cannot be read"),
    "misspelt key": (["RECIPE", "--set", "trainign.max_steps=3"], "unknown key 'trainign'; did you mean 'training'"),
    "unknown method": (["RECIPE", "--set", "method=sclora"], "did you mean 'scalora'"),
    "unknown option": (["RECIPE", "--set", "method.options.intervall=3"], "intervall"),
    "bad option value": (["RECIPE", "--set", "method.options.interval=0"], "interval is 0"),
    "missing data file": (["RECIPE", "--set", "task.data.train=FOLDER/none.jsonl"], "none.jsonl"),
    "missing column": (["RECIPE", "--set", "task.prompt='{headlin}'"], "no column 'headlin'"),
    "empty data": (["RECIPE", "--set", "task.data.train=FOLDER/empty.jsonl"], "no rows"),
    "rank too large": (["RECIPE", "--set", "method.rank=1000"], "method.rank is 1000"),
    "no such modules": (["RECIPE", "--set", "method.target_modules=[nothing]"], "method.target_modules"),
    "unsupported optimizer": (["RECIPE", "--set", "training.optim=adafactor"], "Adafactor"),
    "coupled weight decay": (
        ["RECIPE", "--set", "training.optim=sgd", "--set", "training.weight_decay=0.1"],
        "weight_decay=0.1",
    ),
    "wrong kind of model": (["RECIPE", "--set", "model=FOLDER/bert"], "cannot be a causal-lm model"),
    "missing model": (["RECIPE", "--set", "model=FOLDER/nowhere"], "nowhere"),
    "output under a file": (["RECIPE", "--set", "output=FOLDER/data.jsonl/run"], "cannot be written"),
    "read-only output": (["RECIPE", "--set", "output=/proc/run"], "cannot be written"),
    "bad training value": (["RECIPE", "--set", "training.eval_strategy=sometimes"], "training"),
    "too few rows": (["RECIPE", "--set", "task.data.test_size=1000"], "test_size is 1000"),
    "resume and overwrite": (["RECIPE", "--resume", "--overwrite"], "give one of the two"),
    "a key twice": (["RECIPE", "--set", "config={a: 1, a: 2}"], "the key 'a' of line 1 is there again"),
    "output of nobody": (["RECIPE", "--set", "output=~nobody-here/run"], "of a user that there is not"),
    "model of nobody": (["RECIPE", "--set", "model=~nobody-here/llama"], "of a user that there is not"),
    "data of nobody": (["RECIPE", "--set", "task.data.folder=~nobody-here"], "of a user that there is not"),
    "output that is no path": (["RECIPE", "--set", 'output="a\\0b"'], "output: 'a\\x00b' holds a null character"),
    "half a character": (["RECIPE", "--set", 'task.prompt="\\ud800"'], "holds half a character"),
    "nothing to resume": (["RECIPE", "--resume"], "no checkpoint"),
    "dtype": (["RECIPE", "--set", "dtype=float8"], "dtype"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message_and_exit_code_2(laid, case):
    folder, recipe = laid
    (folder / "empty.jsonl").write_text("")
    arguments, words = BAD[case]
    before = sorted(str(p) for p in folder.rglob("*"))
    result = _invoke("train", *(a.replace("RECIPE", str(recipe)).replace("FOLDER", str(folder)) for a in arguments))
    assert result.exit_code == 2, (result.output, result.exception)
    assert words in result.stderr
    assert result.stderr.count("error:") == 1
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.output
    assert sorted(str(p) for p in folder.rglob("*")) == before  # nothing half-written


def test_refreshes_that_never_come_are_refused_before_anything_is_scored(laid):
    options = ["method={name: scalora-refresh, rank: 2}", "training.max_steps=25", f"output={laid[0] / 'never'}"]
    result = _invoke("train", laid[1], *(part for option in options for part in ("--set", option)))
    assert result.exit_code == 2
    assert "refresh is 25, but training has 25 steps" in result.stderr
    assert "scoring" not in result.output
    assert not (laid[0] / "never").exists()


def test_unknown_verbs_and_flags_exit_with_2():
    for arguments in (["trian"], ["train"], ["train", "x.yaml", "--sett", "a=b"]):
        assert _invoke(*arguments).exit_code == 2


def test_without_the_extras_it_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from scalora.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "scalora[cli]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_compare_without_its_extra_says_what_to_install(laid, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find(name, *rest)
    )
    result = _invoke("compare", laid[1])
    assert result.exit_code == 2
    assert "scalora[arena]" in result.stderr


@pytest.mark.parametrize("arguments", [["reproduce"], ["compare", "recipes/digits.yaml"]])
def test_a_missing_extra_is_named(monkeypatch, arguments):
    monkeypatch.setattr("scalora.cli.guard.importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "pip install 'scalora[arena]'" in result.stderr


def test_the_version_is_said():
    result = _invoke("--version")
    assert (result.exit_code, result.output.split()) == (0, ["scalora", version("scalora")])


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            {"accuracy": 0.5, "nll": 1.0},
            {"accuracy": 0.6, "nll": 1.5},
            "worse than before training: nll 1.0000 → 1.5000",
        ),
        ({"accuracy": 0.5, "nll": 1.0}, {"accuracy": 0.4, "nll": 0.9}, None),
        ({"pearson": 0.5}, {"pearson": 0.4}, "worse than before training: pearson 0.5000 → 0.4000"),
        ({"pearson": 0.5}, {"pearson": 0.5}, None),
        (None, {"nll": 1.0}, None),
    ],
)
def test_a_run_that_made_it_worse_says_so(before, after, said):
    metrics = {"before": before, "after": after, "primary": next(iter(after)), "higher_is_better": "nll" not in after}
    found = worse_sentence(metrics)
    assert found is None if said is None else found.startswith(said)


def test_the_training_time_adds_up(laid, tmp_path):
    result = _invoke("train", laid[1], "--set", f"output={tmp_path / 'run'}")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["steps_seconds"] <= metrics["train_seconds"]
    assert metrics["seconds_per_step"] <= metrics["steps_seconds"]
    assert f"{metrics['train_seconds']:.1f} s, of which steps" in " ".join(result.output.split())
