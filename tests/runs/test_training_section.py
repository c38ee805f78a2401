"""Every field of TrainingArguments in a recipe: it works, or it is refused in one message at load."""

import dataclasses
import math

import pytest
from transformers import TrainingArguments

from helpers import workspace
from scalora import ScaloraError
from scalora.runs.loading import load_inputs
from scalora.runs.recipe import load_recipe, parse_recipe
from scalora.runs.training import train

# What works, in groups that are one run each.
WORKS = [
    {
        "per_device_train_batch_size": 3, "num_train_epochs": 1.0, "max_steps": 2, "learning_rate": 1e-3,
        "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}, "warmup_steps": 0.5,
        "optim": "adamw_torch", "weight_decay": 0.01, "adam_beta1": 0.8, "adam_beta2": 0.9,
        "adam_epsilon": 1e-7, "gradient_accumulation_steps": 2, "average_tokens_across_devices": False,
        "max_grad_norm": 0.5, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cache": False, "neftune_noise_alpha": 5.0, "torch_empty_cache_steps": 1, "bf16": False, "fp16": False,
        "tf32": None, "seed": 3, "data_seed": 4, "use_cpu": True, "optim_target_modules": None, "torch_compile": False,
    },
    {
        "max_steps": 2, "logging_strategy": "steps", "logging_steps": 1, "logging_first_step": True,
        "log_on_each_node": False, "logging_nan_inf_filter": False, "include_num_input_tokens_seen": "non_padding",
        "log_level": "error", "log_level_replica": "error", "disable_tqdm": True, "report_to": [], "run_name": "x",
        "project": "x", "trackio_space_id": "x", "trackio_bucket_id": "x", "trackio_static_space_id": False,
        "save_strategy": "steps", "save_steps": 1, "save_on_each_node": True, "save_total_limit": 1,
        "restore_callback_states_from_checkpoint": True, "debug": "", "skip_memory_metrics": True,
        "accelerator_config": {"even_batches": False}, "activation_checkpointing": False,
        "activation_checkpointing_kwargs": None, "use_liger_kernel": False, "liger_kernel_config": None,
        "torch_compile_backend": None, "torch_compile_mode": None, "full_determinism": False,
    },
    {
        "max_steps": 2, "optim": "sgd", "optim_args": "momentum=0.5",
        "dataloader_drop_last": True, "dataloader_num_workers": 1, "dataloader_pin_memory": False,
        "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2, "dataloader_in_order": True,
        "dataloader_multiprocessing_context": "fork", "train_sampling_strategy": "group_by_length",
    },
    {
        "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1, "per_device_eval_batch_size": 3,
        "prediction_loss_only": True, "eval_on_start": True, "eval_do_concat_batches": False,
        "eval_use_gather_object": False, "eval_accumulation_steps": 1, "include_for_metrics": ["loss"],
        "batch_eval_metrics": False, "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
        "greater_is_better": True, "save_strategy": "steps", "save_steps": 1,
    },
]  # fmt: skip
CLASSIFIES = {"label_smoothing_factor"}  # the rest is with test_a_label_can_be_smoothed

# What is refused, whatever its value but that of doing nothing.
REFUSED = {
    "push_to_hub": True, "hub_model_id": "x", "hub_strategy": "end", "hub_token": "hf_secret", "hub_private_repo": True,
    "hub_always_push": True, "hub_revision": "x", "deepspeed": {}, "fsdp": "full_shard", "fsdp_config": {},
    "parallelism_config": {}, "local_rank": 0, "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": True, "ddp_static_graph": True, "ddp_backend": "gloo", "ddp_timeout": 1,
    "label_names": ["x"], "length_column_name": "x", "bf16_full_eval": True, "fp16_full_eval": True,
    "save_only_model": True, "ignore_data_skip": True, "auto_find_batch_size": True, "enable_jit_checkpoint": True,
    "output_dir": "x", "resume_from_checkpoint": "x", "do_train": True, "do_eval": True, "do_predict": True,
    "early_stopping_patience": 3, "early_stopping_threshold": 0.1,
}  # fmt: skip
NEITHER = {"remove_unused_columns"}  # nothing is unused

WRONG = [
    *((name, value) for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps") for value in (0, -1)),
    *(
        (name, value)
        for name in (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "eval_accumulation_steps", "save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor",
        )
        for value in (0, -1, 1.5)
    ),
    *(
        (name, value)
        for name in (
            "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay",
            "neftune_noise_alpha",
        )
        for value in (-1, math.nan, math.inf, "nan", "much")
    ),
    ("adam_beta1", 1.0), ("adam_beta2", -0.1), ("label_smoothing_factor", 1.5), ("dataloader_num_workers", -1),
    ("seed", -1), ("seed", 2**32), ("seed", 1.5), ("data_seed", -1), ("max_steps", 0), ("max_steps", -5),
    *(
        (name, "nonsense")
        for name in (
            "eval_strategy", "save_strategy", "logging_strategy", "lr_scheduler_type", "optim", "log_level",
            "train_sampling_strategy", "include_num_input_tokens_seen", "log_level_replica",
        )
    ),
    ("optim_args", "abc"), ("optim_args", "momentum=0.5"), ("gradient_checkpointing_kwargs", {"nonsense": 1}),
    ("activation_checkpointing_kwargs", {"nonsense": 1}), ("include_for_metrics", "loss"),
    ("load_best_model_at_end", 3),
]  # fmt: skip

# What only transformers knows to be wrong: still one message, before the model is read.
WRONG_TOGETHER = [
    ({"load_best_model_at_end": True}, "load_best_model_at_end requires"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
    ({"lr_scheduler_type": "greedy"}, "requires an eval strategy"),
    ({"eval_strategy": "steps"}, r"training\.eval_strategy is 'steps', but there is no validation data"),
    ({"eval_on_start": True}, r"training\.eval_on_start is True, but there is no validation data"),
    ({"accelerator_config": "nowhere.json"}, "nowhere.json"),
    ({"accelerator_config": {"a": 1}}, "unexpected keyword argument 'a'"),
    ({"debug": "nonsense"}, "nonsense is not a valid DebugOption"),
    ({"tf32": True, "use_cpu": True}, "tf32 requires"),
    ({"dataloader_prefetch_factor": 2}, "prefetch_factor can only be set"),
    ({"logging_steps": 1.5}, "must be an integer if bigger than 1"),
]
WRONG_IN_TRAINER = [
    ({"report_to": "nonsense"}, "nonsense is not supported"),
    ({"lr_scheduler_kwargs": {"a": 1}}, "unexpected keyword argument 'a'"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
    ({"dataloader_persistent_workers": True}, "persistent_workers"),
    ({"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "nonsense"}, "multiprocessing_context"),
    ({"optim": "adamw_torch_npu_fused"}, "torch_npu"),
]


def _recipe(path, training, **task):
    recipe = load_recipe(path, [f"task.data.{name}={value}" for name, value in task.items()])
    content = recipe.model_dump(mode="json")
    return parse_recipe({**content, "training": {**content["training"], "max_steps": 1, **training}})


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    return workspace.lay(tmp_path_factory.mktemp("ground"))


def test_a_mistyped_choice_is_answered_by_the_nearest(laid):
    with pytest.raises(ScaloraError, match=r"optim is 'adamw_troch': did you mean 'adamw_torch'\?$"):
        _recipe(laid, {"optim": "adamw_troch"})


def test_every_field_is_decided_on():
    works = {name for group in WORKS for name in group}
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - works - set(REFUSED) == NEITHER | CLASSIFIES
    assert set(REFUSED) - fields == {"early_stopping_patience", "early_stopping_threshold"}


@pytest.mark.parametrize("group", range(len(WORKS)))
def test_what_works(laid, monkeypatch, group):
    for slow in ("draw_curves", "draw_rank"):
        monkeypatch.setattr(f"scalora.runs.training.{slow}", lambda *arguments: None)
    metrics = train(_recipe(laid, WORKS[group], validation_size=6), overwrite=True).metrics
    assert metrics["steps"] == 2
    evaluated = [entry for entry in metrics["log"] if "eval_loss" in entry]
    assert len(evaluated) == (3 if "eval_strategy" in WORKS[group] else 0)


def test_a_label_can_be_smoothed(laid):
    overrides = [*workspace.classification(laid.parent), "training.label_smoothing_factor=0.1", "training.max_steps=1"]
    assert train(load_recipe(laid, overrides), overwrite=True).metrics["steps"] == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(laid, name):
    with pytest.raises(ScaloraError, match=rf"training: {name} is .*leave it out") as caught:
        _recipe(laid, {name: REFUSED[name]})
    assert "make room" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_what_is_refused_may_be_said_to_be_off(laid):
    off = {name: False for name, value in REFUSED.items() if value is True and not name.startswith("do_")}
    recipe = _recipe(laid, {**off, "hub_token": None, "deepspeed": None, "remove_unused_columns": False})
    assert not set(off) & set(recipe.training)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named_at_load(laid, name, value):
    with pytest.raises(ScaloraError, match=f"training: {name}"):
        _recipe(laid, {name: value})


@pytest.mark.parametrize(("training", "words"), WRONG_TOGETHER)
def test_what_does_not_go_together_is_one_message(laid, training, words):
    with pytest.raises(ScaloraError, match=rf"^training.*{words}" if not words.startswith("training") else words):
        load_inputs(_recipe(laid, training))


@pytest.mark.parametrize(("training", "words"), WRONG_IN_TRAINER)
def test_what_trainer_refuses_is_one_message(laid, training, words):
    with pytest.raises(ScaloraError, match=f"^training: .*{words}"):
        train(_recipe(laid, training), overwrite=True, baseline=False, ranks=False)


@pytest.mark.parametrize("value", [False, "no"])
def test_no_is_a_strategy_although_yaml_reads_a_truth_value(laid, value):
    training = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), value)
    assert {_recipe(laid, training).training[name] for name in training} == {"no"}


def test_rows_that_fill_no_batch_are_not_dropped_without_a_word(laid):
    options = ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=64", "training.max_steps=3"]
    with pytest.raises(ScaloraError, match="dataloader_drop_last is true, and 40 training rows do not fill one batch"):
        load_inputs(load_recipe(laid, options))


def test_one_process_keeps_to_one_of_several_gpus(laid, monkeypatch):
    ready = TrainingArguments.__post_init__

    def on_two(self):
        ready(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_two)
    arguments = load_inputs(load_recipe(laid, ["training.per_device_train_batch_size=4"])).arguments
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
