"""What lies in a folder is scored as the run scored it; on other rows, by other recipes, and after a stop."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from helpers import heads, tokenized, workspace
from scalora.common.errors import ScaloraError
from scalora.runs.evaluate import evaluate_folder
from scalora.runs.export.export import export
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Interrupted, train
from scalora.tasks.multiple_choice import MultipleChoiceTask

SHORT = ["training.max_steps=4", "training.save_steps=2"]


def _same(path, result, **options):
    found = evaluate_folder(path, **options)
    assert found.score.metrics == pytest.approx(result.metrics["after"], abs=1e-5)
    return found


@pytest.mark.parametrize("method", ["scalora-i", "white-refresh", "full", "mora", "peft:VERA"])
def test_a_run_has_the_score_that_it_had(tmp_path, method):
    recipe = workspace.lay(tmp_path)
    options = [*SHORT, "method={rank: 2, options: {}}", f"method.name={method}"]
    result = train(load_recipe(recipe, options), ranks=False)
    found = _same(tmp_path / "run", result)
    assert found.recorded == result.metrics["after"]
    assert (found.split, found.rows, found.precision.precision) == ("test", 20, "float32")
    assert [each.predicted for each in found.score.predictions] == [e.predicted for e in result.after.predictions]
    before = result.metrics["before"]
    assert found.score.metrics["nll"] != pytest.approx(before["nll"], abs=1e-4)  # it is not the base that is scored


@pytest.mark.parametrize("kind", ["seq2seq", "token_classification", "image_classification"])
def test_other_heads(tmp_path, kind):
    recipe = workspace.lay(tmp_path)
    heads.lay(tmp_path)
    result = train(load_recipe(recipe, [*SHORT, *heads.recipes(tmp_path, 19)[kind]]), ranks=False)
    _same(tmp_path / "run", result)


def test_a_classifier_and_labels_that_are_others(tmp_path):
    recipe = workspace.lay(tmp_path)
    task = workspace.classification(tmp_path)
    result = train(load_recipe(recipe, [*SHORT, *task]), ranks=False)
    _same(tmp_path / "run", result)
    rows = [{"text": f"the {'abcdefgh'[i % 8]} {i}", "label": i % 3, "id": i} for i in range(60)]
    tokenized.write_jsonl(tmp_path / "three.jsonl", rows)
    with pytest.raises(ScaloraError, match=r"the task has 3 labels, but .* was trained on 2: .* task.labels"):
        evaluate_folder(tmp_path / "run", overrides=[task[0].replace("data.jsonl", "three.jsonl")])
    rows = [row | {"label": "no" if row["label"] else "yes"} for row in rows]
    tokenized.write_jsonl(tmp_path / "named.jsonl", rows)
    with pytest.raises(ScaloraError, match=r"labels are \['no', 'yes'\], but .* was trained on \['0', '1'\]"):
        evaluate_folder(tmp_path / "run", overrides=[task[0].replace("data.jsonl", "named.jsonl")])


def test_a_network_of_vectors(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "digits.yaml"
    result = train(load_recipe(recipe, ["training.max_steps=10", f"output={tmp_path / 'run'}"]), ranks=False)
    _same(tmp_path / "run", result)


def test_what_is_compared_with_the_base_is_so_here_too(tmp_path):
    recipe = workspace.lay(tmp_path)
    texts = [f"the {word} {one}" for word in ("cat", "dog", "sky", "mat") for one in "abcdefgh"]
    pairs = [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in texts]
    tokenized.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    task = f"task={{kind: preference, data: {{train: {tmp_path / 'pairs.jsonl'}, test_size: 8}}}}"
    result = train(load_recipe(recipe, [*SHORT, task]), ranks=False)
    _same(tmp_path / "run", result)


def test_exports_checkpoints_and_bare_adapters(tmp_path):
    recipe = workspace.lay(tmp_path)
    result = train(load_recipe(recipe, SHORT), ranks=False)
    for to in ("lora", "merged", "delta"):
        export(tmp_path / "run", to=to, output=tmp_path / to, examples=0)
        assert _same(tmp_path / to, result).recorded == result.metrics["after"]
    _same(tmp_path / "run" / "checkpoints" / "checkpoint-4", result)
    (tmp_path / "merged" / "export.json").unlink()  # a model of whoever's, which lies there whole
    (tmp_path / "run" / "adapter").rename(tmp_path / "alone")
    for bare in ("merged", "alone"):
        with pytest.raises(ScaloraError, match=r"belongs to no run.*--recipe"):
            evaluate_folder(tmp_path / bare)
        assert _same(tmp_path / bare, result, recipe=recipe).recorded is None


def test_other_rows_and_other_settings(tmp_path):
    recipe = workspace.lay(tmp_path)
    train(load_recipe(recipe, [*SHORT, "task.data.validation_size=8"]), ranks=False)
    assert (found := evaluate_folder(tmp_path / "run", split="validation")).rows == 8
    assert found.recorded is None
    assert evaluate_folder(tmp_path / "run", split="train").rows == 32
    rows = [{"text": "the cat z", "label": 0, "id": 90}, {"text": "the sky z", "label": 1, "id": 91}]
    tokenized.write_jsonl(tmp_path / "more.jsonl", rows)
    more = f"task.data.test={tmp_path / 'more.jsonl'}"
    found = evaluate_folder(tmp_path / "run", overrides=[more, "score_batch_size=1", "precision=bfloat16"])
    assert (found.rows, found.recorded, found.precision.precision) == (2, None, "bfloat16")
    assert evaluate_folder(tmp_path / "run", overrides=["task.data.test_size=1", more]).rows == 1


def test_what_cannot_be_is_refused_by_name(tmp_path):
    recipe = workspace.lay(tmp_path)
    train(load_recipe(recipe, SHORT), ranks=False)
    run = tmp_path / "run"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"split": "tset"}, "split is 'tset'.*train, validation, test"),
        ({"split": "validation"}, "no validation rows.*task.data.validation.*train, test"),
        ({"overrides": ["training.seed=1"]}, "training.seed=1.*task, precision, score_batch_size"),
        ({"overrides": ["task.prompt"]}, "write key=value"),
        ({"recipe": tmp_path / "none.yaml"}, "none.yaml cannot be read"),
        ({"overrides": workspace.classification(tmp_path)[:1]}, "task.kind is 'classification'.*causal-lm"),
    ]
    for options, said in cases:
        with pytest.raises(ScaloraError, match=said):
            evaluate_folder(run, **options)
    with pytest.raises(ScaloraError, match="there is no"):
        evaluate_folder(tmp_path / "nothing")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_what_was_trained_is_there_where_scoring_it_is_stopped(tmp_path, failure):
    options = [*SHORT, "training.save_strategy=no"]
    recipe = workspace.lay(tmp_path)
    expected = train(load_recipe(recipe, [*options, f"output={tmp_path / 'whole'}"]), ranks=False)
    score, calls = MultipleChoiceTask.score, []

    def scored(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:  # the first is before training
            raise failure
        return score(self, *args, **kwargs)

    raised = pytest.raises(Interrupted if failure is KeyboardInterrupt else failure)
    with patch.object(MultipleChoiceTask, "score", scored), raised as caught:
        train(load_recipe(recipe, options), ranks=False)
    if failure is KeyboardInterrupt:
        assert (caught.value.checkpoint, caught.value.trained) == (None, tmp_path / "run" / "adapter")
    assert not (tmp_path / "run" / "metrics.json").exists()
    _same(tmp_path / "run", expected)


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    from scalora.cli import app

    recipe = workspace.lay(tmp_path)
    result = train(load_recipe(recipe, SHORT), ranks=False)
    file = tmp_path / "scores.json"
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--output", str(file)])
    assert done.exit_code == 0, done.output
    assert "20 test rows" in done.output
    assert "after training" in done.output
    written = json.loads(file.read_text())
    assert written["metrics"] == pytest.approx(result.metrics["after"], abs=1e-5)
    assert len(written["predictions"]) == 20
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--output", str(tmp_path)])
    assert done.exit_code == 2
