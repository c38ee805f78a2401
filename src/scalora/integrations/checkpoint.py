"""What a Trainer checkpoint needs beside PEFT's own files, so that a resumed run continues where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adapters import ACCUMULATED
from ..engine import ScaLora
from ..errors import ScaloraError
from ..stores.tuner import activate, find_peft_model

STATE_FILE = "scalora.safetensors"
BASE_FILE = "scalora_base.safetensors"


def save_state(handle: ScaLora, folder: Path) -> None:
    """Write ``handle.state_dict()`` to ``folder``."""
    tensors: dict[str, Tensor] = {}
    plain = _split(handle.state_dict(), "", tensors)
    _save(tensors, folder / STATE_FILE, {"state": json.dumps(plain)})


def load_state(handle: ScaLora, folder: Path) -> None:
    """Inverse of :func:`save_state`.

    Raises:
        ScaloraError: the file is missing or damaged, or belongs to another configuration.
    """
    path = folder / STATE_FILE
    tensors = _load(path)
    with safe_open(path, framework="pt") as file:
        plain = json.loads(file.metadata()["state"])
    handle.load_state_dict(_join(plain, "", tensors))


def save_moved(handle: ScaLora, folder: Path) -> None:
    """Write what accumulate='base' has moved: the base weights themselves. (PEFT saves the accumulated adapter.)"""
    if handle.config.accumulate == "base":
        weights = {layer.name: layer.base_weight.detach().contiguous() for layer in handle.layers}
        _save(weights, folder / BASE_FILE, {})


def load_moved(handle: ScaLora, model: nn.Module, folder: Path) -> None:
    """Put back the accumulated update of a checkpoint: its second adapter, or its base weights."""
    if handle.config.accumulate == "base":
        weights = _load(folder / BASE_FILE)
        with torch.no_grad():
            for layer in handle.layers:
                layer.base_weight.copy_(weights[layer.name])
    else:
        load_accumulated(model, folder)


def load_accumulated(model: nn.Module, folder: Path) -> None:
    """Put back the second adapter of a checkpoint, active and frozen.

    Raises:
        ScaloraError: the checkpoint holds none.
    """
    path = folder / ACCUMULATED
    if not path.is_dir():
        raise ScaloraError(f"checkpoint {folder} holds no {ACCUMULATED!r} adapter: it was not written by a ScaLoRA run")
    find_peft_model(model).load_adapter(str(path), ACCUMULATED, is_trainable=True)  # True: stay in training mode
    activate(model)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
    os.replace(temporary, path)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ScaloraError(
            f"{path} is missing: resume from a checkpoint that a ScaLoRA run wrote, and name it with "
            "ScaLoraCallback(resume_from=...) if it does not lie in output_dir"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ScaloraError(f"{path} is damaged ({error}): resume from an earlier checkpoint") from error


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Nested dicts without their tensors, which go to ``tensors`` under their path."""
    if isinstance(value, dict):
        return {key: _split(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, Tensor):
        tensors[path] = value
        return None
    return value


def _join(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _join(item, f"{path}/{key}", tensors) for key, item in value.items()}
    return tensors.get(path, value)
