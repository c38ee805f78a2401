"""A base model that is quantised: targeted weights rounded to NF4, and what whoever loads the result is told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ...algebra.nf4 import NF4, from_nf4, nf4_rounded
from ...common.disk_layout import FORMER_NF4_BASE, QUANTISED_BASE
from ...common.errors import ScaloraError
from ...models.origin import origin, set_origin


@torch.no_grad()
def round_to_nf4(model: nn.Module, modules: Iterable[str]) -> None:
    """Make the weights of these modules of a plain model what NF4 keeps of them, in place; its origin says so.

    Raises:
        ScaloraError: a weight serves elsewhere in the model too.
    """
    names = tuple(modules)
    refuse_tied(model, names)
    for name in names:
        weight: Any = model.get_submodule(name).weight
        weight.copy_(nf4_rounded(weight))
    rounded_to_nf4(model, names)


def rounded_to_nf4(model: nn.Module, modules: Iterable[str]) -> None:
    """Let a model's origin say which of its weights are in NF4."""
    set_origin(model, replace(origin(model), quantization="nf4-rounded", nf4=tuple(modules)))


def refuse_tied(model: nn.Module, modules: Iterable[str]) -> None:
    """Raises ScaloraError where one of these modules shares its weight, so that quantising it would change another."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in modules:
        if owners[id(model.get_submodule(name).weight)] > 1:
            raise ScaloraError(
                f"quantization is 'nf4-rounded', but {name} shares its weight with another module (tied embeddings), "
                "which would be quantised too: leave it out of method.target_modules"
            )


def write_base_note(folder: Path, model: PreTrainedModel | PeftModel, own: Mapping[str, NF4] | None = None) -> None:
    """Note beside a saved adapter that it stands on a quantised base.

    Args:
        folder: of the adapter.
        model: what was trained, wrapped or not.
        own: weights of modules, by their plain names, that are not just what NF4 keeps of the source's.
    """
    tensors = {f"{name}.{part}": t.cpu() for name, q in (own or {}).items() for part, t in q._asdict().items()}
    known = origin(model)
    dtype = str(model.dtype).removeprefix("torch.")
    about = {"quantization": known.quantization, "modules": known.nf4, "dtype": dtype, "config": dict(known.overrides)}
    temporary = folder / f"{QUANTISED_BASE}.tmp"
    save_file(tensors, temporary, {"format": "pt", "base": json.dumps(about)})
    temporary.replace(folder / QUANTISED_BASE)


def base_note(folder: Path) -> dict[str, Any]:
    """What :func:`write_base_note` has noted: quantization, modules, dtype and config; empty where nothing is.

    Raises:
        ScaloraError: the note is damaged.
    """
    if not _note(folder).is_file():
        return {}
    with _reading(folder) as file:
        return {"quantization": "nf4-rounded"} | dict(json.loads(file.metadata()["base"]))


@torch.no_grad()
def read_nf4_base(folder: Path, model: nn.Module) -> None:
    """Make a freshly loaded base model what the adapter in ``folder`` stands on, in place, by the note there.

    Raises:
        ScaloraError: the note is damaged, or of another model.
    """
    modules = base_note(folder)["modules"]
    with _reading(folder) as file:
        own = [name for name in modules if f"{name}.codes" in file.keys()]  # noqa: SIM118  (no mapping)
        round_to_nf4(model, [name for name in modules if name not in own])
        for name in own:
            weight: Any = model.get_submodule(name).weight
            weight.copy_(from_nf4(NF4(*(file.get_tensor(f"{name}.{part}") for part in NF4._fields)), weight))
    rounded_to_nf4(model, modules)


@contextmanager
def _reading(folder: Path) -> Iterator[Any]:
    file = _note(folder)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, ScaloraError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ScaloraError(f"{file} cannot be used ({reason}): take another copy of the adapter") from error


def _note(folder: Path) -> Path:
    former = folder / FORMER_NF4_BASE
    return former if former.is_file() else folder / QUANTISED_BASE


def own_lines(path: Path) -> list[str]:
    """The lines that load an adapter, and the quantised base that it stands on."""
    return ["import scalora", f"model = scalora.load({str(path)!r})"]
