"""What `scalora compare` refuses, before anything runs."""

import pytest
from typer.testing import CliRunner

from helpers import workspace
from scalora.cli import app


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "lora,loar"], "did you mean 'lora'"),
        (["--methods", "lora@x"], "whole rank"),
        (["--methods", "mora:type"], "method:option=value"),
        (["--methods", "mora:tipe=1"], "tipe"),
        (["--methods", "scalora-i:interval=2:interval=3"], "interval is there twice"),
        (["--methods", "lora,lora"], "--methods"),
        (["--methods", "scalora-i:interval=2/2"], "interval has a value twice"),
        (["--methods", "scalora-i:interval='2'"], "plain number or word"),
        (["--methods", "scalora-i:interval=[2]"], "plain number or word"),
        (["--methods", "scalora-i:interval=2/"], "method:option=value"),
        (["--methods", "scalora-i:interval=2/never"], "interval"),
        (["--methods", "lora:alpha=0"], "alpha is 0"),
        (["--methods", "full:alpha=3"], "alpha"),
        (["--alpha", "much"], "--alpha 'much'"),
        (["--alpha", "4,4"], "--alpha is 4.0, 4.0"),
        (["--alpha", "-4"], "--alpha is -4"),
        (["--alpha", ""], "--alpha ''"),
        (["--lr", "fast"], "--lr 'fast'"),
        (["--lr", "0"], "must be positive"),
        (["--lr", "nan"], "must be positive and finite"),
        (["--lr", "1e-3,inf"], "must be positive and finite"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--extend", "-2"], "--extend is -2: give 0 or more"),
        (["--confirm", "-1"], "--confirm is -1: give 0 or more"),
        (["--set", "task.data.validation_size=null"], "validation"),
        (["--set", "model=./nowhere"], "there is no file or folder './nowhere'"),
        (["--set", "task.data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--set", "task.prompt='{txet}'"], "txet"),
        (["--set", "task.data.train_size=5000"], "5000"),
        (["--set", "method.target_modules=[kwery]"], "which no linear module of this model matches"),
        (["--set", "method.target_modules=query"], "for names write [query]"),
        (["--set", "training.warmup_steps=-1"], "warmup"),
    ],
)
def test_bad_input_gets_one_message_and_exit_code_2(tmp_path, arguments, words):
    recipe = workspace.lay(tmp_path)
    common = ["compare", str(recipe), "--set", "task.data.validation_size=10", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*common, *arguments])
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_where_every_trial_fails_the_command_fails_and_says_why(tmp_path):
    recipe = workspace.lay(tmp_path)
    small = ["--set", "task.data.validation_size=10", "--set", "training.max_steps=2"]
    common = ["compare", str(recipe), *small, "--seeds", "1", "--lr", "1e-3", "--no-curve"]
    where = ["--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*common, "--methods", "lora@1000", *where])
    assert result.exit_code == 2, result.output
    assert "every trial failed" in result.stderr
    assert "--retry" in result.stderr
    assert (tmp_path / "out" / "results.json").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    place = tmp_path / "file"
    place.write_text("mine")
    common = ["compare", str(workspace.lay(tmp_path)), "--set", "task.data.validation_size=10", "--methods", "lora"]
    for output in (place, place / "below"):
        result = CliRunner().invoke(app, [*common, "--output", str(output)])
        assert result.exit_code == 2, result.output
        assert f"--output {output} cannot be written to" in result.stderr
    assert place.read_text() == "mine"
