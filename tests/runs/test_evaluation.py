"""A recipe's validation data while it is trained: what is measured is right, and measuring changes nothing."""

import json

import pytest

from helpers import heads, workspace
from helpers.runs_of_two import STEADY, batch, double_precision
from scalora import ScaloraError
from scalora.runs import training
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train

EVALUATE = [
    "task.data.validation_size=12", "training.eval_strategy=steps", "training.eval_steps=2", "training.save_steps=2",
    "training.learning_rate=0.05",
]  # fmt: skip
BEST = [*EVALUATE, "training.load_best_model_at_end=true"]


def _evaluations(result):
    return [entry for entry in result.metrics["log"] if "eval_loss" in entry]


@pytest.mark.parametrize("method", ["lora", "scalora", "full", "mora"])
@pytest.mark.parametrize("metric", ["loss", "accuracy", "answer_nll"])
def test_the_best_checkpoint_is_what_is_left(tmp_path, method, metric):
    path = workspace.lay(tmp_path)
    # Training on only makes it worse, so that the best is not the last.
    worse = [] if metric == "accuracy" else ["training.learning_rate=3", "training.max_grad_norm=0"]
    options = [*BEST, *worse, f"method={{name: {method}, rank: 2}}", f"training.metric_for_best_model={metric}"]
    result = train(load_recipe(path, options), ranks=False)
    found = _evaluations(result)
    values = [entry[f"eval_{metric}"] for entry in found]
    best = found[values.index(max(values) if metric == "accuracy" else min(values))]
    assert result.metrics["validation"]["answer_nll"] == pytest.approx(best["eval_loss"], rel=1e-4)
    if metric != "loss":
        assert result.metrics["validation"]["accuracy"] == best["eval_accuracy"]
        assert best["eval_answer_nll"] == pytest.approx(best["eval_loss"], rel=1e-4)


def test_fewer_nats_per_byte_are_better(tmp_path):
    path = workspace.lay(tmp_path)
    data = f"{{train: {tmp_path / 'data.jsonl'}, test_size: 10, columns: {{id: id}}}}"
    options = [f"task={{kind: text, max_length: 16, data: {data}}}", *BEST, "training.learning_rate=1e-3"]
    result = train(load_recipe(path, [*options, "training.metric_for_best_model=nats_per_byte"]), ranks=False)
    values = [entry["eval_nats_per_byte"] for entry in _evaluations(result)]
    assert min(values) < max(values)
    assert result.metrics["validation"]["nats_per_byte"] == pytest.approx(min(values), rel=1e-4)


def test_evaluating_changes_nothing_and_resumes(tmp_path):
    path = workspace.lay(tmp_path)
    dropout = "method={name: scalora, rank: 2, dropout: 0.3}"
    plain = train(load_recipe(path, [*EVALUATE, "training.eval_strategy=no", dropout, f"output={tmp_path / 'plain'}"]))
    options = [*BEST, dropout, "training.metric_for_best_model=accuracy", "training.save_total_limit=1"]
    whole = train(load_recipe(path, [*options, f"output={tmp_path / 'whole'}"]))
    losses = [[e["loss"] for e in run.metrics["log"] if "loss" in e] for run in (plain, whole)]
    assert losses[0] == losses[1]

    with workspace.stopped_at(5), pytest.raises(training.Interrupted):
        train(load_recipe(path, options))
    resumed = train(load_recipe(path, options), resume=True)
    assert resumed.metrics["after"] == whole.metrics["after"]
    kept = {folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()}
    best = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    assert kept == {"checkpoint-8", f"checkpoint-{best['best_global_step']}"}  # no limit deletes the best


@pytest.mark.parametrize("strategy", ["epoch", "best"])
@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "linear"])
def test_other_ways_to_ask_for_it(tmp_path, strategy, scheduler):
    options = [
        *EVALUATE, "task.data.train_size=16", f"training.save_strategy={strategy}",
        f"training.eval_strategy={'epoch' if strategy == 'epoch' else 'steps'}", "training.metric_for_best_model=nll",
        f"training.lr_scheduler_type={scheduler}",
    ]  # fmt: skip
    result = train(load_recipe(workspace.lay(tmp_path), options), baseline=False, ranks=False)
    assert all({"eval_nll", "eval_accuracy", "eval_loss"} <= set(entry) for entry in _evaluations(result))
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_the_test_split_is_never_looked_at(tmp_path):
    with pytest.raises(ScaloraError, match=r"no validation data: name a source in task\.data\.validation"):
        train(load_recipe(workspace.lay(tmp_path), [*EVALUATE, "task.data.validation_size=null"]))


@pytest.mark.parametrize("baseline", [True, False])
def test_a_metric_that_the_task_has_not(tmp_path, baseline):
    options = [*BEST, "training.metric_for_best_model=f1"]
    with pytest.raises(ScaloraError, match="is 'f1', which this task has not: choose loss or accuracy"):
        train(load_recipe(workspace.lay(tmp_path), options), baseline=baseline, ranks=False)


def test_classes_are_evaluated_too(tmp_path):
    options = [*workspace.classification(tmp_path), *BEST, "training.metric_for_best_model=accuracy"]
    result = train(load_recipe(workspace.lay(tmp_path), options))
    best = max(_evaluations(result), key=lambda entry: entry["eval_accuracy"])
    assert result.metrics["validation"]["accuracy"] == best["eval_accuracy"]


def test_a_tracker_that_cannot_be_reached_is_no_full_disk(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise ConnectionError("no route to the tracker")

    monkeypatch.setattr(training.StepTimer, "on_step_begin", fail)
    with pytest.raises(ScaloraError, match=r"the network failed \(no route to the tracker\).*report_to: none"):
        train(load_recipe(workspace.lay(tmp_path)), baseline=False, ranks=False)


@pytest.mark.parametrize("kind", ["seq2seq", "token_classification", "image_classification"])
def test_a_batch_in_parts_is_learnt_as_one(tmp_path, kind):
    """Their losses are means over a batch's labels, of which the parts have unlike numbers."""
    recipe = workspace.lay(tmp_path)
    heads.lay(tmp_path)
    own = [*heads.recipes(tmp_path, 20)[kind], *STEADY, "method=lora", "task.data.validation_size=8",
           "training.eval_strategy=steps", "training.eval_steps=8"]  # fmt: skip
    parts = ([*batch(4), f"output={tmp_path}/whole"],
             [*batch(1), f"output={tmp_path}/parts", "training.gradient_accumulation_steps=4"])  # fmt: skip
    found = []
    for part in parts:
        with double_precision():
            result = train(load_recipe(recipe, [*own, *part]))
        logged = result.metrics["log"]
        found.append([entry["loss"] for entry in logged if "loss" in entry])
        found[-1].append(next(entry["eval_loss"] for entry in logged if "eval_loss" in entry))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
