"""What a Trainer checkpoint needs beside PEFT's own files, so that a resumed run continues where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..common.disk_layout import BASE_FILE, STATE_FILE, WEIGHTS
from ..common.errors import ScaloraError
from ..layers.lora_forward import LoraForward
from ..layers.peft_lora import ACCUMULATED, find_peft_model
from ..layers.sharding import copy_into, gather_full, is_sharded, reshard
from .event import ScaLora
from .stores.peft_tuner import activate


def save_state(handle: ScaLora, folder: Path, write: bool = True) -> None:
    """Write ``handle.state_dict()`` to ``folder``; with ``write=False`` only help to gather it."""
    tensors: dict[str, Tensor] = {}
    plain = _split(handle.state_dict(), "", tensors)
    if write:
        _save(tensors, folder / STATE_FILE, {"state": json.dumps(plain)})


def read_state(folder: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, for ``handle.load_state_dict``.

    Raises:
        ScaloraError: the file is missing or damaged.
    """
    path = folder / STATE_FILE
    tensors = _load(path)
    with safe_open(path, framework="pt") as file:
        plain = json.loads(file.metadata()["state"])
    return _join(plain, "", tensors)


def save_moved(handle: ScaLora, model: nn.Module, folder: Path, write: bool = True) -> None:
    """Write what PEFT does not: the base weights of accumulate='base', and a sharded accumulated adapter.

    With ``write=False`` only help to gather it.
    """
    if handle.config.accumulate == "base":
        names, path = [layer.name for layer in handle.layers], folder / BASE_FILE
        tensors = gather_full([layer.base_weight.detach() for layer in handle.layers])
    elif _any_sharded(model):
        state = get_peft_model_state_dict(find_peft_model(model), adapter_name=ACCUMULATED)
        names, tensors, path = list(state), gather_full(list(state.values())), folder / ACCUMULATED / WEIGHTS
    else:
        return
    if write:
        _save(dict(zip(names, tensors, strict=True)), path, {"format": "pt"})
        if handle.config.accumulate == "adapter":
            find_peft_model(model).peft_config[ACCUMULATED].save_pretrained(str(path.parent))


def load_moved(handle: ScaLora, model: nn.Module, folder: Path) -> None:
    """Put back the accumulated update of a checkpoint: its second adapter, or its base weights."""
    if handle.config.accumulate == "base":
        weights = _load(folder / BASE_FILE)
        reshard(model)
        with torch.no_grad():
            copy_into([layer.base_weight for layer in handle.layers], [weights[x.name] for x in handle.layers])
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
    peft_model = find_peft_model(model)
    if _any_sharded(model):  # PEFT would copy whole tensors into sharded ones
        reshard(model)
        weights = _load(path / WEIGHTS)
        state = get_peft_model_state_dict(peft_model, adapter_name=ACCUMULATED)
        with torch.no_grad():
            copy_into(list(state.values()), [weights[name] for name in state])
        for module in model.modules():
            if isinstance(module, LoraForward):
                module.used_columns = None
    else:
        peft_model.load_adapter(str(path), ACCUMULATED, is_trainable=True)  # True: stay in training mode
    activate(model)


def _any_sharded(model: nn.Module) -> bool:
    return any(is_sharded(p) for p in model.parameters())


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
