"""Ways of writing a tiny adapted model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import (
    LoraConfig,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import scalora
from helpers import tokenized
from helpers.lives import IDS, Life
from scalora import ScaLoraCallback, ScaLoraConfig
from scalora.engine.plain_lora import Truncation
from scalora.runs.export.export import export

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.cat([IDS, IDS.flip(1)])]


def adapter_folder(folder: Path, name: str) -> Path:
    """Where PEFT puts the adapter of this name."""
    return folder if name == "default" else folder / name


# Writing: each gives what a reader of its kind is handed.


def save_pretrained(life: Life, **options: Any) -> Path:
    life.model.save_pretrained(folder := life.place(), **options)
    return folder if life.native else adapter_folder(folder, life.name)


def _trained_only(life: Life) -> Path:
    """As LLaVA's scripts: what is trained, by its names, whatever PEFT would have asked for."""
    return save_pretrained(
        life, state_dict={n: p.detach() for n, p in life.model.named_parameters() if p.requires_grad}
    )


def _by_hand(life: Life) -> Path:
    (folder := life.place()).mkdir(parents=True)
    state = get_peft_model_state_dict(life.model, adapter_name=life.name)
    if life.native:  # as transformers' own save_pretrained
        state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    config = life.model.peft_config[life.name]
    config.save_pretrained(str(folder))
    save_file({n: t.contiguous().clone() for n, t in state.items()}, folder / "adapter_model.safetensors")
    return folder


def trainer_of(life: Life, model: Any, folder: Path, steps: int, *callbacks: TrainerCallback) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, use_cpu=True, seed=1,
        report_to="none", disable_tqdm=True, learning_rate=3e-3, logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=ROWS, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _checkpoint(life: Life) -> tuple[Path, LoraConfig, ScaLoraConfig]:
    base = life.written or (life.may_write and life.rng.random() < 0.5)
    if life.handle is not None:
        life.handle.detach()
    life.optimizer = life.handle = None
    config = ScaLoraConfig(interval=1, accumulate="base" if base else "adapter")
    life.written = base
    trainer = trainer_of(life, life.model, folder := life.place(), 2, ScaLoraCallback(config))
    trainer.train()
    return folder / "checkpoint-2", life.config, config


def _save_model(life: Life) -> Path:
    trainer_of(life, life.model, folder := life.place(), 2).save_model()
    return adapter_folder(folder, life.name)


def _accelerate(life: Life) -> tuple[Path, LoraConfig]:
    accelerator = Accelerator(cpu=True)
    folder = life.place()
    if life.rng.random() < 0.5:
        accelerator.save_model(life.model, folder)
    else:
        accelerator.prepare(life.model)
        accelerator.save_state(str(folder))
    return folder / "model.safetensors", life.config


def _torch_save(life: Life) -> tuple[Path, LoraConfig]:
    (folder := life.place()).mkdir(parents=True)
    torch.save(life.model.state_dict(), folder / "state.pt")
    return folder / "state.pt", life.config


def _plain_lora(life: Life) -> Path:
    return scalora.save_plain_lora(life.model, life.place())


def _truncated(life: Life) -> Path:
    """To full rank: nothing is lost."""
    return scalora.save_plain_lora(life.model, life.place(), Truncation(rank=20))


def _merged(life: Life) -> Path:
    copy.deepcopy(life.model).merge_and_unload(adapter_names=[life.name]).save_pretrained(folder := life.place())
    tokenized.tokenizer().save_pretrained(folder)
    return folder


def _export(life: Life) -> Path:
    folder = save_pretrained(life)
    to = life.rng.choice(["lora", "merged"])
    return export(folder, to=to, output=life.place(), base=str(life.base), examples=0).folder


def _memory(life: Life) -> Any:
    return life.model


WRITERS: dict[str, tuple[str, Callable[[Life], Any]]] = {
    "save_pretrained": ("adapter", save_pretrained),
    "save_pretrained(state_dict)": ("adapter", lambda life: save_pretrained(life, state_dict=life.model.state_dict())),
    "save_pretrained(trained only)": ("adapter", _trained_only),
    "save_pretrained(unsafe)": ("adapter", lambda life: save_pretrained(life, safe_serialization=False)),
    "save_pretrained(selected)": ("adapter", lambda life: save_pretrained(life, selected_adapters=[life.name])),
    "by hand": ("adapter", _by_hand),
    "Trainer.save_model": ("adapter", _save_model),
    "save_plain_lora": ("adapter", _plain_lora),
    "save_plain_lora(truncated)": ("adapter", _truncated),
    "Trainer checkpoint": ("checkpoint", _checkpoint),
    "accelerate": ("state", _accelerate),
    "torch.save(state_dict)": ("state", _torch_save),
    "merged": ("whole", _merged),
    "export": ("export", _export),
    "memory": ("memory", _memory),
}
NATIVE = {"save_pretrained", "by hand", "torch.save(state_dict)", "memory", "accelerate"}
# What writes no adapter of low rank, and so may hold written base weights.
WHOLE = {"Trainer checkpoint", "accelerate", "torch.save(state_dict)", "merged", "memory"}
