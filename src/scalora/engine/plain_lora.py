"""One plain LoRA of trained and accumulated columns: loads wherever LoRA loads, without scalora."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..algebra.lowrank import singular_values, truncate
from ..common.disk_layout import PREFIX, WEIGHTS
from ..common.errors import ScaloraError, named
from ..common.files import replace_folder
from ..layers.exactness import why_inexact
from ..layers.joined_config import joined_ranks, pattern_name, plain_name, rank_and_alpha, unwritable
from ..layers.layout import as_columns, as_rows, each_expert, like_lora_a, like_lora_b, matrix_keys
from ..layers.peft_lora import AdapterLayer, find_peft_model
from ..layers.sharding import gather_full, is_writer
from ..layers.stand_in import StandIn
from .chosen import choose_layers

Factors: TypeAlias = Callable[[AdapterLayer], tuple[Tensor, Tensor]]  # of a layer's whole update P Qᵀ


def joined_factors(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """P (m, k) and Q (n, k), detached, with P Qᵀ = the layer's whole low-rank update, trained and accumulated.

    Of experts (E, m, k) and (E, n, k).
    """
    A, Bt = gather_full([layer.A.detach(), layer.Bt.detach()])
    A, Bt = as_columns(A, layer.experts), as_rows(Bt, layer.experts)
    held = layer.module.held(layer.adapter) if isinstance(layer.module, StandIn) else None
    if held is not None:
        P, Qt = held.columns()
        used = P.any(0) & Qt.any(1)
        A, Bt = torch.cat([A.to(P.dtype), P[:, used]], 1), torch.cat([Bt.to(P.dtype), Qt[used]])
    A, Bt = each_expert(A, Bt, layer.experts)
    return A * layer.scale, Bt.mT


class Kept(NamedTuple):
    """What a truncation kept of one layer's update."""

    columns: int  # before
    rank: int  # after
    energy: float  # share of the squared Frobenius norm, 1 where nothing was lost


class Truncation:
    """Factors for :func:`save_plain_lora`: of each layer the best approximation of a given rank or energy.

    Args:
        rank: of every layer; one of fewer columns is filled up with zeros.
        energy: share of each layer's squared Frobenius norm that its rank must keep at least, as small as that allows.
        factors: what is truncated.

    Raises:
        ScaloraError: not exactly one of the two is given, or it is out of range.

    Examples:
        >>> scalora.save_plain_lora(model, "small", Truncation(rank=16))
    """

    def __init__(
        self, *, rank: int | None = None, energy: float | None = None, factors: Factors = joined_factors
    ) -> None:
        if (rank is None) == (energy is None):
            raise ScaloraError(f"rank is {rank} and energy is {energy}: give one of the two")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ScaloraError(f"rank is {rank!r}: it must be a whole number of 1 or more")
        if energy is not None and (not isinstance(energy, int | float) or not 0 < energy < 1):
            raise ScaloraError(
                f"energy is {energy}: it must lie between 0 and 1 (both excluded); 1 needs no truncation"
            )
        _check_factors(factors)
        self.rank, self.energy, self.factors = rank, energy, factors
        self.kept: dict[str, Kept] = {}  # by layer, of the latest use

    def __call__(self, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
        """P (m, rank) and Q (n, rank) of the layer's approximation, by its singular value decomposition in float64.

        Of experts each is approximated; their energy counts together.
        """
        P, Q = self.factors(layer)
        rank = self.rank or _rank_for(self.energy or 1.0, singular_values(P.double(), Q.double()))
        best = truncate(P.double(), Q.double(), rank)
        total = best.total.sum()
        energy = 1 - float(best.discarded.sum() / total) if total > 0 else 1.0
        self.kept[layer.name] = Kept(P.shape[-1], rank, energy)
        return best.P.to(P), best.Q.to(Q)


def _rank_for(energy: float, sigma: Tensor) -> int:
    """The smallest rank, at least 1, that keeps this share of Σσ²; σ is (l), of experts (E, l)."""
    cumulated = sigma.square().view(-1, sigma.shape[-1]).sum(0).cumsum(-1)
    return min(len(cumulated), 1 + int((cumulated < energy * cumulated[-1]).sum()))


def save_plain_lora(model: nn.Module, path: str | Path, factors: Factors = joined_factors) -> Path:
    """Save trained and accumulated columns as one plain PEFT LoRA adapter with the same function and scale 1.

    Of several processes the first one writes. With a model sharded by FSDP2 every process must call it.

    Args:
        model: a model trained with accumulate="adapter" (or plain LoRA, which is saved as it is).
        path: the folder to write; replaced as a whole once everything is on disk.
        factors: what the update of each layer is, where it is more than these columns, or less
            (:class:`Truncation`).

    Returns:
        The folder. ``PeftModel.from_pretrained(base, path)`` loads it without scalora.

    Raises:
        ScaloraError: the model holds no trained LoRA adapter, or one whose initialisation, or accumulate="base", has
            changed the base weights; something else than an adapter lies at ``path``, or nothing can be written there.
    """
    _check_factors(factors)
    if not isinstance(path, str | Path) or not str(path):
        raise ScaloraError(f"path is {path!r}: give the name of a folder")
    state, config = plain_lora(model, factors)
    folder = Path(os.path.abspath(path))
    temporary = folder.parent / f"{folder.name}.tmp"
    try:
        other = folder.is_dir() and any(folder.iterdir()) and not (folder / "adapter_config.json").is_file()
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or other or not folder.name:
            raise ScaloraError(
                f"path is {str(path)!r}, which is no adapter's folder and will not be replaced: name another"
            )
        if not is_writer():
            return Path(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_plain_lora(temporary, state, config)
        replace_folder(temporary, folder)
    except ScaloraError:
        raise
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: a zero byte in the name
        shutil.rmtree(temporary, ignore_errors=True)
        raise ScaloraError(f"path {str(path)!r} cannot be written to ({error}): name another, or make room") from error
    return Path(path)


def _check_factors(factors: Any) -> None:
    if isinstance(factors, type) or not callable(factors):
        raise ScaloraError(f"factors is {named(factors)}: leave it out, or give e.g. Truncation(rank=8)")


def plain_lora(model: nn.Module, factors: Factors = joined_factors) -> tuple[dict[str, Tensor], LoraConfig]:
    """What :func:`save_plain_lora` writes; sharded tensors are gathered, so that every process must call it."""
    trained, left = choose_layers(model, "leave")
    adapter, peft_model = trained[0].adapter, find_peft_model(model, [*trained, *left])
    whole = {layer.module for layer in left}
    layers = [
        AdapterLayer(PREFIX + plain_name(name), module, adapter)
        for name, module in peft_model.base_model.model.named_modules()  # pyright: ignore
        if isinstance(module, LoraLayer) and adapter in module.r
    ]
    config = peft_model.peft_config[adapter]
    assert isinstance(config, LoraConfig)
    untruncated = factors.factors if isinstance(factors, Truncation) else factors
    own = untruncated is joined_factors
    if problem := unwritable(config, [layer.module for layer in layers], adapter, rewritten=own):
        raise ScaloraError(problem)
    found = get_peft_model_state_dict(peft_model, adapter_name=adapter)
    # What a matrix is computed from is no part of a plain LoRA; the matrix itself follows. A sharded model's state has
    # the accumulated columns too.
    beside = tuple(f"{layer.name}.accumulated." for layer in layers)
    state = {n: value for n, value in found.items() if ".parametrizations." not in n and not n.startswith(beside)}
    sizes: dict[str, tuple[int, float]] = {}
    for layer in layers:
        name = pattern_name(layer.name.removeprefix(PREFIX), layer.module)
        if layer.module in whole or why_inexact(layer.module, adapter):
            sizes[name] = rank_and_alpha(layer.module, adapter)  # as it is
            continue
        P, Q = _checked(factors(layer), layer)
        key_A, key_B = (f"{layer.name}.{key.replace(f'.{adapter}', '')}" for key in matrix_keys(layer.module, adapter))
        rows = Q.movedim(-1, 0).flatten(1)  # of experts beside one another
        state[key_A] = like_lora_a(rows, layer.Bt, layer.experts)
        state[key_B] = like_lora_b(P.flatten(0, -2), layer.A, layer.experts)
        sizes[name] = P.shape[-1], P.shape[-1]  # scale 1: it went into the factors
    changes: dict[str, Any] = {"init_lora_weights": True, "inference_mode": True, **joined_ranks(sizes)}
    if config.task_type is None:  # as PEFT itself does, for AutoPeftModel
        base = type(peft_model.get_base_model())
        changes["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    plain = dataclasses.replace(copy.deepcopy(config), **changes)
    return dict(zip(state, gather_full(list(state.values())), strict=True)), plain


def _checked(pair: Any, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """What a caller's factors gave for a layer, if it is a P and a Q of that layer's."""
    m, n = layer.shape
    found = [tuple(each.shape) if isinstance(each, Tensor) else named(each) for each in pair] if _is_pair(pair) else []
    k = found[0][-1] if found and isinstance(found[0], tuple) and found[0] else 0
    each = () if layer.experts == 1 else (layer.experts,)
    if found != [(*each, m, k), (*each, n, k)]:
        wanted = [f"({', '.join(map(str, (*each, size)))}, k)" for size in (m, n)]
        raise ScaloraError(
            f"factors gave {' and '.join(map(str, found)) or named(pair)} for layer {layer.name}: give P {wanted[0]} "
            f"and Q {wanted[1]} of its update P Qᵀ"
        )
    return pair


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def write_plain_lora(folder: Path, state: dict[str, Tensor], config: LoraConfig) -> None:
    """The two files of an adapter, into a folder that exists."""
    # clone: with bias="all" PEFT lists the bias of a module that is saved as a whole under two names.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
