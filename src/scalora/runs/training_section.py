"""A recipe's `training` section: TrainingArguments by their own names, each one that works or is refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from difflib import get_close_matches
from enum import Enum
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from ..common.numeric import refuse_no_number
from .optim_args import refuse_unread

# What a recipe means where it is silent; TrainingArguments' own defaults hold for the rest.
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "logging_steps": 5,
    "report_to": "none",
    "save_total_limit": 2,
    "dataloader_pin_memory": False,
}
_OURS = ("output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "overwrite_output_dir")

_HUB = "a recipe sends nothing to the hub; send the adapter folder of its output there when the run is done"
_LAUNCHER = "how a model is spread over devices is said to torchrun or accelerate launch (docs/devices.md)"
_ROWS = "a recipe's rows hold just what the model reads, under names of scalora's own"
_REFUSED = {
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push",
         "hub_revision"), _HUB,
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "local_rank", "ddp_find_unused_parameters",
         "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"), _LAUNCHER,
    ),
    **dict.fromkeys(("remove_unused_columns", "label_names", "length_column_name"), _ROWS),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "validation data is read in the run's own precision"),
    "save_only_model": "a checkpoint without the optimizer cannot be resumed; to save none set save_strategy: 'no'",
    "ignore_data_skip": "a run that is resumed would not read the rows that it had yet to read",
    "auto_find_batch_size": "a run that changes its batch size can be neither repeated nor resumed",
    "enable_jit_checkpoint": "a run that is stopped saves a checkpoint anyway",
    "early_stopping_patience": "runs go on to their last step; with load_best_model_at_end the best checkpoint counts",
}  # fmt: skip
_REFUSED["early_stopping_threshold"] = _REFUSED["early_stopping_patience"]

# Bounds, both included, that TrainingArguments leaves to a crash or to silence.
_POSITIVE, _AT_LEAST_1, _NOT_NEGATIVE = (5e-324, math.inf), (1, math.inf), (0, math.inf)
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), _POSITIVE),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
         "eval_accumulation_steps", "save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor"),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay",
         "neftune_noise_alpha", "dataloader_num_workers"), _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    "label_smoothing_factor": (0, 1),
}  # fmt: skip
# TrainingArguments takes any word for these.
_CHOICES = {
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no", True, False),
}
_CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
_LOWER_IS_BETTER = ("loss", "nll", "mse", "nats_per_byte")


def read_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """The section's values as TrainingArguments takes them, with what a recipe means where it is silent.

    Raises:
        ValueError: a name that there is not, a value that cannot be, or what a recipe does not offer.
    """
    from transformers import TrainingArguments

    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    types, known = get_type_hints(TrainingArguments), set(fields) - set(_OURS)
    read: dict[str, Any] = {}
    for name, value in given.items():
        if name in _OURS:
            raise ValueError(f"{name} is decided by scalora itself (output, --resume): leave it out")
        if name not in known and name not in _REFUSED:
            near = get_close_matches(name, known, n=1, cutoff=0.7)
            raise ValueError(f"TrainingArguments has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if name in _REFUSED:
            # remove_unused_columns is False in recipes.
            if name not in fields or not (value is None or value is False or value == fields[name].default):
                shown = "given" if name == "hub_token" else repr(value)  # a secret
                raise ValueError(f"{name} is {shown}: {_REFUSED[name]}; leave it out")
            continue
        read[name] = _value(name, value, types[name])
    if read.get("optim_args"):
        optim = read.get("optim", fields["optim"].default)
        refuse_unread(str(getattr(optim, "value", optim)), read["optim_args"])
    return {**_DEFAULTS, **read}


def lower_is_better(metric: str) -> bool:
    """Whether the smaller of two values of a metric, by its name, is the better one."""
    return metric.endswith(_LOWER_IS_BETTER)


def _value(name: str, given: Any, kind: Any) -> Any:
    choices = [[str(member.value) for member in each] for each in get_args(kind) if _is_enum(each)]
    if choices and given is False and "no" in choices[0]:
        given = "no"  # which YAML takes for a truth value
    if choices and isinstance(given, str) and given not in choices[0]:
        near = get_close_matches(given, choices[0], n=1)
        wanted = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices[0])}"
        raise ValueError(f"{name} is {given!r}: {wanted}")
    try:
        refuse_no_number(name, given, kind)
    except PydanticCustomError as error:
        raise ValueError(str(error)) from None
    try:
        value = TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        raise ValueError(f"{name} is {given!r}: {error.errors()[0]['msg']}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {given!r}: it must be a finite number")
    _check(name, value, given)
    return value


def _check(name: str, value: Any, given: Any) -> None:
    if value is None:
        return
    if name in _BOUNDS:
        low, high = _BOUNDS[name]
        if not low <= value <= high:
            raise ValueError(f"{name} is {given!r}: it must be {_words(low, high)}")
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"max_steps is {given!r}: it must be 1 or more, or -1 to count by num_train_epochs")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(f"{name} is {given!r}: choose one of {', '.join(map(str, _CHOICES[name]))}")
    if name == "optim_args" and value and not all(part.count("=") == 1 for part in str(value).split(",")):
        raise ValueError(f"optim_args is {given!r}: write key=value, with commas between")
    if name in ("log_level", "log_level_replica"):
        from transformers.utils.logging import get_log_levels_dict

        if value not in (levels := [*get_log_levels_dict(), "passive"]):
            raise ValueError(f"{name} is {given!r}: choose one of {', '.join(levels)}")
    if name in _CHECKPOINTING and isinstance(value, dict):
        from torch.utils.checkpoint import checkpoint

        known = [*inspect.signature(checkpoint).parameters.values()]
        allowed = [each.name for each in known if each.kind is each.KEYWORD_ONLY or each.default is not each.empty]
        if unknown := [key for key in value if key not in [*allowed, "preserve_rng_state"]]:
            raise ValueError(f"{name}: torch's checkpoint has no {unknown[0]!r}; it has {', '.join(allowed)}")


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _words(low: float, high: float) -> str:
    if low == _POSITIVE[0]:
        return "more than 0"
    if high == math.inf:
        return f"{low} or more"
    return "at least 0 and less than 1" if high == math.nextafter(1, 0) else f"from {low} to {high}"
