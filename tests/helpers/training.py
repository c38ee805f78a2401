"""Short runs of any method on the zoo's tiny models, through transformers' Trainer."""

from __future__ import annotations

from functools import cache
from shutil import copytree
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from helpers import models
from scalora.methods import MethodSpec, build_method

TARGETS = {
    "llama": models.TARGETS["llama"],
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": models.TARGETS["gpt2"],
}
OPTIONS = {"alpha-lora": {"batch": 4}}  # the tiny training sets have few rows


def head(kind):
    return "sequence-classification" if kind == "bert" else "causal-lm"


@cache
def _saved(kind):
    folder = TemporaryDirectory(prefix="scalora-base-")
    models.base(kind).save_pretrained(folder.name)
    return folder


def base(kind, folder):
    """A model that a saved adapter can find again: loaded from a folder, as in life."""
    if not folder.exists():
        copytree(_saved(kind).name, folder)
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(str(folder))


def method(name, kind="llama", **fields):
    options = {**OPTIONS.get(name, {}), **fields.pop("options", {})}
    return build_method(
        MethodSpec(**{"name": name, "rank": 4, "target_modules": TARGETS[kind], "options": options, **fields})
    )


def adapt(name, kind, folder, **fields):
    model = base(kind, folder)
    torch.manual_seed(5)
    adapted = method(name, kind, **fields).adapt(model, head(kind))
    if adapted.remember:
        adapted.remember()
    return adapted


def rows(kind, n=24, different=4):
    """``n`` training rows, of which only ``different`` differ: a few steps must lower the loss."""
    ids = torch.randint(0, models.VOCABULARY, (different, 10), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": r, "labels": r[0] % 3 if kind == "bert" else r} for r in ids.repeat(n // different, 1)]


def trainer(adapted, kind, folder, dataset=None, callbacks=(), **options):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-3, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "seed": 5, "disable_tqdm": True, "save_strategy": "no",
        "lr_scheduler_type": "constant", "remove_unused_columns": False,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    dataset = rows(kind) if dataset is None else dataset
    made = Trainer(
        adapted.model,
        arguments,
        train_dataset=adapted.split_train(dataset) if adapted.split_train else dataset,
        callbacks=[*adapted.callbacks, *callbacks],
        optimizers=(adapted.optimizer(arguments) if adapted.optimizer else None, None),
    )
    made.remove_callback(PrinterCallback)
    return made


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def run_lines(lines):
    """The model that printed lines of Python load."""
    names = {}
    exec("\n".join(lines), names)
    return names["model"]
