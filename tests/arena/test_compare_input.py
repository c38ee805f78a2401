"""What `scalora compare` refuses, before anything runs."""

import pytest
from typer.testing import CliRunner

import ground
from scalora.cli import app


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "lora,loar"], "did you mean 'lora'"),
        (["--methods", "lora@x"], "whole rank"),
        (["--methods", "mora:type"], "method:option=value"),
        (["--methods", "mora:tipe=1"], "tipe"),
        (["--methods", "lora,lora"], "--methods"),
        (["--lr", "fast"], "--lr 'fast'"),
        (["--lr", "0"], "must be positive"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--set", "task.data.validation_size=null"], "validation"),
    ],
)
def test_bad_input_gets_one_message_and_exit_code_2(tmp_path, arguments, words):
    recipe = ground.lay(tmp_path)
    common = ["compare", str(recipe), "--set", "task.data.validation_size=10", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*common, *arguments])
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
