"""What a checkpoint needs beside PEFT's own files, so that a resumed run continues where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..common.disk_layout import BASE_FILE, STATE_FILE
from ..common.errors import ScaloraError
from ..layers.peft_lora import AdapterLayer, sort_layers
from ..layers.sharding import copy_into, gather_full, is_sharded, reshard
from .event import ScaLora, attached_to
from .stores.base_weights import mark_written
from .stores.peft_model import WholeFolders


def save_state(handle: ScaLora, folder: Path, write: bool = True) -> None:
    """Write ``handle.state_dict()`` to ``folder``, and with accumulate='base' the base weights.

    With ``write=False`` only help to gather what is sharded.
    """
    tensors: dict[str, Tensor] = {}
    plain = _split(handle.state_dict(), "", tensors)
    weights: dict[str, Tensor] = {}
    if handle.config.accumulate == "base":
        whole = gather_full([layer.base_weight.detach() for layer in handle.layers])
        weights = {layer.name: weight for layer, weight in zip(handle.layers, whole, strict=True)}
    if write:
        if weights:
            _save(weights, folder / BASE_FILE, {"format": "pt"})
        _save(tensors, folder / STATE_FILE, {"state": json.dumps(plain)})


def read_state(folder: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, for ``handle.load_state_dict``.

    Raises:
        ScaloraError: the file is missing or damaged.
    """
    path = folder / STATE_FILE
    tensors = _load(path)
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads(file.metadata()["state"])
    except (TypeError, KeyError, ValueError) as error:
        raise ScaloraError(f"{path} is damaged ({error!r}): resume from an earlier checkpoint") from error
    return _join(plain, "", tensors)


def load_base(layers: list[AdapterLayer], model: nn.Module, folder: Path) -> None:
    """Put back the base weights of a checkpoint with accumulate='base'.

    Raises:
        ScaloraError: it holds none, or those of other layers.
    """
    weights = _load(folder / BASE_FILE)
    if missing := [layer.name for layer in layers if layer.name not in weights]:
        raise ScaloraError(f"{folder / BASE_FILE} lacks layer {missing[0]}: resume with the same model")
    reshard(model)
    with torch.no_grad():
        copy_into([layer.base_weight for layer in layers], [weights[layer.name] for layer in layers])
    mark_written(layers)


def write_and_read_beside(model: nn.Module) -> None:
    """From now on the model's own saving writes ScaLoRA's state too, and its own loading reads the base weights."""
    for module in model.modules():
        if isinstance(module, WholeFolders):
            module.beside = _write_beside, _read_beside


def writes_beside(model: nn.Module) -> bool:
    """Whether the model's own saving writes ScaLoRA's state: a PeftModel that no process holds a part of only."""
    whole = any(isinstance(module, PeftModel) for module in model.modules())
    return whole and not any(is_sharded(p) for p in model.parameters())


def _write_beside(model: nn.Module, folder: Path) -> None:
    handle = attached_to(model)
    if handle is not None and writes_beside(model):
        adapter = handle.layers[0].adapter
        save_state(handle, folder if adapter == "default" else folder / adapter)


def _read_beside(model: nn.Module, folder: Path) -> None:
    if (folder / BASE_FILE).is_file():
        load_base(sort_layers(model)[0], model, folder)


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
