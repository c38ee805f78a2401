"""Any value anywhere in a recipe: the run works, or there is one message and exit code 2; never a traceback."""

from __future__ import annotations

import copy
import math

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from typer.testing import CliRunner

from helpers import workspace
from scalora.cli import app

VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    0.5,
    -0.5,
    1e-3,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "nonsense",
    "1",
    "{text}",
    "{label}",
    "{",
    "é\n",
    [],
    [None],
    ["q_proj"],
    [" no", " yes"],
    {},
    {"a": 1},
    {"train": "x"},
    "lora",
    "full",
    "cosine",
    "steps",
)
TRAINING = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "logging_steps",
    "logging_strategy",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "eval_strategy",
    "eval_steps",
    "load_best_model_at_end",
    "seed",
    "data_seed",
    "bf16",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "label_smoothing_factor",
    "train_sampling_strategy",
    "report_to",
    "dataloader_num_workers",
    "dataloader_drop_last",
    "gradient_checkpointing",
    "neftune_noise_alpha",
    "metric_for_best_model",
    "torch_compile_mode",
    "optim_args",
    "lr_scheduler_kwargs",
    "use_cpu",
    "label_names",
)
PATHS = (
    "model",
    "dtype",
    "precision",
    "config",
    "config.hidden_size",
    "config.vocab_size",
    "attn_implementation",
    "output",
    "score_batch_size",
    "surprise",
    "task",
    "task.kind",
    "task.data",
    "task.data.train",
    "task.data.test",
    "task.data.train_size",
    "task.data.test_size",
    "task.data.validation_size",
    "task.data.columns",
    "task.data.values",
    "task.data.folder",
    "task.data.seed",
    "task.prompt",
    "task.choices",
    "task.answer",
    "task.normalize",
    "task.max_length",
    "task.continuation",
    "task.text",
    "task.label",
    "task.completion",
    "method",
    "method.name",
    "method.rank",
    "method.alpha",
    "method.dropout",
    "method.target_modules",
    "method.options",
    "method.options.interval",
    "method.options.refresh",
    "method.options.capacity",
    "method.options.lipschitz",
    "method.options.floor",
    "method.options.scaling",
    "method.options.accumulate",
    "training",
    *(f"training.{name}" for name in TRAINING),
)


# Each example is a run, too slow to shrink what fails.
QUICK = settings(
    deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate], derandomize=True
)


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ground")
    recipe = yaml.safe_load(workspace.lay(folder).read_text())
    recipe["training"] |= {"max_steps": 1, "save_strategy": "no"}
    del recipe["precision"]  # what most recipes leave to the device
    return folder, recipe


def _put(recipe: dict, path: str, value: object) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        child = recipe.get(parent)
        recipe[parent] = child = child if isinstance(child, dict) else {}
        recipe = child
    recipe[last] = value


@settings(QUICK, max_examples=80)
@given(changes=st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(VALUES)), min_size=1, max_size=2))
def test_any_value_anywhere_works_or_is_refused_in_one_line(laid, changes):
    folder, valid = laid
    recipe = copy.deepcopy(valid)
    recipe["output"] = str(folder / "run")
    for path, value in changes:
        _put(recipe, path, value)
    if isinstance(recipe["output"], str):  # nothing is written elsewhere
        recipe["output"] = str(folder / "run")
    (folder / "fuzzed.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(folder / "fuzzed.yaml"), "--overwrite"])
    assert result.exit_code in (0, 2), (changes, result.exception, result.output[-500:])
    assert result.exception is None or isinstance(result.exception, SystemExit), changes
    if result.exit_code == 2:
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, (changes, result.stderr)
        assert "Traceback" not in result.output


METHODS = (
    "lora",
    "rslora",
    "dora",
    "pissa",
    "scalora",
    "scalora-i",
    "scalora-nonnegative",
    "scalora-scalar",
    "scalora-normalize",
    "scalora-refresh",
    "relora",
    "mora",
    "hira",
    "full",
)


@settings(QUICK, max_examples=20)
@given(
    method=st.sampled_from(METHODS),
    rank=st.integers(1, 6),
    dropout=st.sampled_from([0.0, 0.1]),
    targets=st.sampled_from(["all-linear", ["q_proj"], ["q_proj", "down_proj"], r".*layers\.1.*(up|down)_proj"]),
    training=st.fixed_dictionaries(
        {},
        optional={
            "optim": st.sampled_from(["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"]),
            "lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant_with_warmup"]),
            "gradient_accumulation_steps": st.integers(1, 3),
            "gradient_checkpointing": st.booleans(),
            "max_grad_norm": st.sampled_from([0.0, 1.0]),
            "seed": st.integers(0, 5),
            "weight_decay": st.sampled_from([0.0]),
        },
    ),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    precision=st.sampled_from(["auto", "float32", "bfloat16"]),
)
def test_valid_recipes_run(laid, monkeypatch, method, rank, dropout, targets, training, dtype, precision):
    assume(method != "full" or dtype == "float32")  # whose small steps bf16 weights would lose: refused
    folder, valid = laid
    recipe = copy.deepcopy(valid)
    recipe |= {"output": str(folder / "valid"), "dtype": dtype, "precision": precision}
    recipe["training"] |= training
    recipe["method"] = {"name": method, "rank": rank, "dropout": dropout, "target_modules": targets}
    if method == "scalora-refresh":  # refused where no refresh would take place
        recipe["method"]["options"] = {"refresh": 2}
        recipe["training"]["max_steps"] = 3
    for slow in ("draw_curves", "draw_rank"):  # every run above draws them
        monkeypatch.setattr(f"scalora.runs.training.{slow}", lambda *arguments: None)
    (folder / "valid.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(folder / "valid.yaml"), "--overwrite"])
    assert result.exit_code == 0, (recipe, result.exception, result.output[-500:])
