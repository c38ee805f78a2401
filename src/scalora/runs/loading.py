"""All that a recipe names, loaded and checked against one another: rows, model, training arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from transformers import TrainingArguments, set_seed

from ..common.disk_layout import CHECKPOINTS
from ..common.errors import ScaloraError
from ..common.files import expand_user
from ..methods import method_class
from ..methods.support.nf4_base import refuse_tied, round_to_nf4
from ..methods.support.targets import find_targets
from ..models.heads import HEADS, Head, find_heads
from ..models.load import load_model
from ..models.packed import is_packed, refuse_rows_of_odd_length
from ..models.running_statistics import hold_statistics
from ..tasks import Split, Task, build_task
from ..tasks.causality import check_causal
from ..tasks.positions import check_positions, check_vocabulary
from ..tasks.task import Collator, TokenDataset
from .callbacks import StepTimer
from .precision import AUTOCAST, decide
from .recipe import Recipe
from .training_section import lower_is_better


@dataclass(frozen=True)
class Loaded:
    """What every method starts from; the model is on the CPU, and nothing has been adapted yet."""

    task: Task
    arguments: TrainingArguments
    model: Any
    tokenizer: Any  # None where the model reads vectors
    heads: list[str]  # names of modules that start at random
    datasets: dict[Split, TokenDataset]  # of every split that there is
    collator: Collator
    quantization: str = "none"
    rounded: tuple[str, ...] = ()  # modules whose weights are yet to be rounded to NF4
    score_batch_size: int = 32

    @property
    def dataset(self) -> TokenDataset:
        """What is trained on."""
        return self.datasets["train"]

    @property
    def validation(self) -> TokenDataset | None:
        """What is looked at where the recipe evaluates while it trains."""
        return self.datasets["validation"] if _evaluates(self.arguments) else None


def load_inputs(recipe: Recipe) -> Loaded:
    """Load a recipe's data and model.

    Raises:
        ScaloraError: something is missing, cannot be read, or does not go with the rest; the message names it.
    """
    task, arguments = build_task(recipe.task), _arguments(recipe)
    if task.splits.validation is None and _evaluates(arguments):
        asked = "eval_on_start" if arguments.eval_strategy == "no" else "eval_strategy"
        value = recipe.training[asked]
        value = getattr(value, "value", value)
        raise ScaloraError(
            f"training.{asked} is {value!r}, but there is no validation data: name a source "
            "in task.data.validation or set task.data.validation_size"
        )
    _check_packed(recipe)
    autocast = AUTOCAST[decide(recipe.precision, recipe.training).precision]
    set_seed(arguments.seed)  # a classification head starts at random
    model, tokenizer = load_model(
        recipe.model, head=task.head, num_labels=task.num_labels, class_names=task.class_names,
        dtype=recipe.dtype, config=recipe.config, attn_implementation=recipe.attn_implementation,
        quantization=recipe.quantization, compute=autocast or torch.float32,
    )  # fmt: skip
    if arguments.label_smoothing_factor and not HEADS[task.head].labelled:
        raise ScaloraError(
            f"training.label_smoothing_factor is {arguments.label_smoothing_factor}: language-model tasks are trained "
            "on the plain likelihood of their answers; leave it out"
        )
    if task.tokens != (tokenizer is not None):
        reads, wants = ("tokens", "vectors") if tokenizer else ("vectors", "tokens")
        raise ScaloraError(f"model: {recipe.model!r} reads {reads}, but task.kind {recipe.task.kind!r} gives {wants}")
    heads = [name for name, _ in find_heads(model, task.head)]
    if recipe.head_learning_rate is not None and not heads:
        raise ScaloraError(
            f"head_learning_rate is {recipe.head_learning_rate:g}, but this model has no classification head that "
            "starts at random: leave it out"
        )
    there: list[Split] = [split for split in get_args(Split) if getattr(task.splits, split)]
    datasets: dict[Split, TokenDataset] = {split: task.train_dataset(tokenizer, split) for split in there}
    refuse_no_step(arguments, len(datasets["train"]))
    if task.tokens:
        check_vocabulary(model, tokenizer, datasets)
    check_positions(model, datasets, getattr(task.spec, "max_length", None), task.max_written)
    rounded = _rounded(recipe, model, task.head)
    return Loaded(
        task,
        arguments,
        model,
        tokenizer,
        heads,
        datasets,
        task.collator(tokenizer, model),
        recipe.quantization,
        rounded,
        recipe.score_batch_size,
    )


def refuse_no_step(arguments: TrainingArguments, rows: int) -> None:
    """Raise ScaloraError where all training rows are dropped: Trainer would end after no step, without a word."""
    batch = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and rows < batch:
        raise ScaloraError(
            f"training.dataloader_drop_last is true, and {rows} training rows do not fill one batch of {batch}, so "
            "that nothing would be trained: leave it out, or lower training.per_device_train_batch_size"
        )


def _rounded(recipe: Recipe, model: Any, head: Head) -> tuple[str, ...]:
    """The modules whose weights the recipe wants in NF4, and whose method leaves that to the run."""
    method = method_class(recipe.method.name)
    if recipe.quantization != "nf4-rounded":
        if method.quantises and recipe.quantization == "none":
            raise ScaloraError(
                f"method.name is {method.name!r}, which starts adapters for a base in NF4: set quantization: nf4, or "
                "nf4-rounded, which keeps its values as floats"
            )
        return ()
    names = tuple(name for name, _ in find_targets(model, recipe.method, head))
    refuse_tied(model, names)
    return () if method.quantises else names


def _check_packed(recipe: Recipe) -> None:
    """Raises ScaloraError where the recipe wants packed weights and its method does not train on such."""
    method = method_class(recipe.method.name)
    if is_packed(recipe.quantization) and recipe.quantization not in method.packed:
        possible = " or ".join((*method.packed, "nf4-rounded"))
        raise ScaloraError(
            f"quantization is {recipe.quantization!r}, on which method.name {recipe.method.name!r} cannot train: set "
            f"quantization: {possible}, or choose another method"
        )
    if is_packed(recipe.quantization) and recipe.method.options.get("accumulate") == "base":
        raise ScaloraError(
            f"method.options.accumulate is 'base', but quantization {recipe.quantization!r} packs the base, so that "
            "nothing can be added to it: choose accumulate: adapter, or quantization: nf4-rounded"
        )


def made_ready(loaded: Loaded, autocast: torch.dtype | None) -> Loaded:
    """With the model's base weights as the recipe wants them, on the run's device, seen to be what its task needs.

    What the task compares with the base model is measured here, before anything is adapted.

    Args:
        loaded: what is to be trained.
        autocast: dtype to compute in, if not the model's.

    Raises:
        ScaloraError: as :func:`~scalora.tasks.causality.check_causal`.
    """
    if loaded.rounded:
        round_to_nf4(loaded.model, loaded.rounded)
    hold_statistics(loaded.model, loaded.heads)
    loaded.model.to(loaded.arguments.device)
    if loaded.arguments.device.type == "cpu":
        refuse_rows_of_odd_length(loaded.model)
    if loaded.task.head == "causal-lm":
        lean = isinstance(loaded.collator, Collator)
        collator = loaded.collator if lean else Collator(loaded.tokenizer.pad_token_id)
        found = check_causal(loaded.model, collator, loaded.dataset, autocast)
        loaded = replace(loaded, collator=found) if lean else loaded
    loaded.task.refer(loaded.model, loaded.tokenizer, loaded.datasets, loaded.score_batch_size, autocast)
    loaded.task.equip(loaded.model)
    return loaded


def check(recipe: Recipe) -> Loaded:
    """Load what a recipe names and train nothing: what fails here would fail with every method.

    Raises:
        ScaloraError: as :func:`load_inputs` and :func:`made_ready`, or no module is targeted.
    """
    loaded = load_inputs(recipe)
    made_ready(loaded, AUTOCAST[decide(recipe.precision, recipe.training).precision])
    find_targets(loaded.model, recipe.method, loaded.task.head)
    return loaded


@contextmanager
def setting_up(timer: StepTimer | None = None) -> Iterator[None]:
    """Until the first step begins, whatever fails does so because of the training arguments."""
    try:
        yield
    except ScaloraError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, ImportError, RuntimeError) as error:
        if timer is not None and timer.began:
            raise
        raise ScaloraError(f"training: {' '.join(str(error).split())}") from error


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # some arguments are names of files
        raise ScaloraError(f"training: {' '.join(str(error).split())}") from error


def _evaluates(arguments: TrainingArguments) -> bool:
    return arguments.eval_strategy != "no" or arguments.eval_on_start


def _arguments(recipe: Recipe) -> TrainingArguments:
    output = expand_user(recipe.output) / CHECKPOINTS
    # Trainer allows bf16 on a CPU only where it is told that the CPU is meant.
    ours: dict[str, Any] = {
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": not torch.accelerator.is_available(),
    }
    ours["label_names"] = ["labels"]  # Trainer would look for them in a signature that wrappers hide
    precision = decide(recipe.precision, recipe.training).precision
    ours |= {"bf16": precision == "bfloat16", "fp16": precision == "float16"}
    if (metric := recipe.training.get("metric_for_best_model")) and recipe.training.get("greater_is_better") is None:
        ours["greater_is_better"] = not lower_is_better(metric)
    ours |= {name: value for name, value in recipe.training.items() if value is not None or name not in ours}
    with setting_up(), _reading():
        arguments = TrainingArguments(output_dir=str(output), **ours)
    # Beside other GPUs Trainer would put copies on them (nn.DataParallel), which neither adapters nor batches are for.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
