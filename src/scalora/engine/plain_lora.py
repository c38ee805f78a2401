"""One plain LoRA out of the trained and the accumulated adapter: loads wherever LoRA loads, without scalora."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..algebra.lowrank import singular_values, truncate
from ..common.disk_layout import WEIGHTS
from ..common.errors import ScaloraError
from ..common.files import replace_folder
from ..layers.peft_lora import ACCUMULATED, AdapterLayer, changes_base, find_layers, find_peft_model
from ..layers.sharding import gather_full, is_writer

Factors: TypeAlias = Callable[[AdapterLayer], tuple[Tensor, Tensor]]  # of a layer's whole update P Qᵀ


def joined_factors(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """P (m, k) and Q (n, k), detached, with P Qᵀ = the layer's whole low-rank update, trained and accumulated."""
    A, Bt = gather_full([layer.A.detach(), layer.Bt.detach()])
    P, Q = [A * layer.scale], [Bt.mT]
    if ACCUMULATED in layer.module.lora_A:
        A, Bt = gather_full([layer.frozen().A.detach(), layer.frozen().Bt.detach()])
        used = A.any(0) & Bt.any(1)
        P.append(A[:, used].to(P[0]))
        Q.append(Bt[used].mT.to(Q[0]))
    return torch.cat(P, 1), torch.cat(Q, 1)


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
        if rank is not None and rank < 1:
            raise ScaloraError(f"rank is {rank}: it must be 1 or more")
        if energy is not None and not 0 < energy < 1:
            raise ScaloraError(
                f"energy is {energy}: it must lie between 0 and 1 (both excluded); 1 needs no truncation"
            )
        self.rank, self.energy, self.factors = rank, energy, factors
        self.kept: dict[str, Kept] = {}  # by layer, of the latest use

    def __call__(self, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
        """P (m, rank) and Q (n, rank) of the layer's approximation, by its singular value decomposition in float64."""
        P, Q = self.factors(layer)
        rank = self.rank or _rank_for(self.energy or 1.0, singular_values(P.double(), Q.double()))
        best = truncate(P.double(), Q.double(), rank)
        energy = 1 - float(best.discarded / best.total) if best.total > 0 else 1.0
        self.kept[layer.name] = Kept(P.shape[1], rank, energy)
        return best.P.to(P), best.Q.to(Q)


def _rank_for(energy: float, sigma: Tensor) -> int:
    """The smallest rank, at least 1, that keeps this share of Σσ²."""
    cumulated = sigma.square().cumsum(-1)
    return min(len(sigma), 1 + int((cumulated < energy * cumulated[-1]).sum()))


def save_plain_lora(model: nn.Module, path: str | Path, factors: Factors = joined_factors) -> Path:
    """Save trained and accumulated adapter as one plain PEFT LoRA adapter with the same function.

    Of several processes the first one writes. With a model sharded by FSDP2 every process must call it.

    Args:
        model: a model trained with accumulate="adapter" (or plain LoRA, which is saved as it is).
        path: the folder to write; replaced as a whole once everything is on disk.
        factors: what the update of each layer is, where it is more than these two adapters, or less
            (:class:`Truncation`).

    Returns:
        The folder. ``PeftModel.from_pretrained(base, path)`` loads it without scalora.

    Raises:
        ScaloraError: the model holds no trained LoRA adapter, or one whose initialisation, or accumulate="base", has
            changed the base weights; or something else than an adapter lies at ``path``.
    """
    state, config = plain_lora(model, factors)
    folder, temporary = Path(path), Path(f"{path}.tmp")
    other = folder.is_dir() and any(folder.iterdir()) and not (folder / "adapter_config.json").is_file()
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or other:
        raise ScaloraError(
            f"path is {str(path)!r}, which is no adapter's folder and will not be replaced: name another"
        )
    if not is_writer():
        return folder
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_plain_lora(temporary, state, config)
    replace_folder(temporary, folder)
    return folder


def plain_lora(model: nn.Module, factors: Factors = joined_factors) -> tuple[dict[str, Tensor], LoraConfig]:
    """What :func:`save_plain_lora` writes; sharded tensors are gathered, so that every process must call it."""
    layers = find_layers(model)
    peft_model = find_peft_model(model)
    if getattr(peft_model.base_model, "base_written", False):
        raise ScaloraError(
            "accumulate='base' has added its moved differences to the base weights, which no LoRA adapter of this rank "
            "holds: save the whole model (model.merge_and_unload() and save_pretrained)"
        )
    adapter = layers[0].adapter
    config = peft_model.peft_config[adapter]
    assert isinstance(config, LoraConfig)
    untruncated = factors.factors if isinstance(factors, Truncation) else factors
    if untruncated is joined_factors and changes_base(config.init_lora_weights):
        raise ScaloraError(
            f"init_lora_weights={config.init_lora_weights!r} has changed the base weights, so that a plain LoRA "
            "adapter would not fit the original base: save the whole model (model.merge_and_unload() and "
            "save_pretrained), or train from another initialisation"
        )
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter, save_embedding_layers=False)
    ranks: dict[str, int] = {}
    for layer in layers:
        P, Q = factors(layer)
        name = "base_model.model." + layer.name.split("base_model.model.", 1)[-1]
        state[f"{name}.lora_B.weight"], state[f"{name}.lora_A.weight"] = P, Q.mT
        ranks[name.removeprefix("base_model.model.")] = P.shape[1]
    return dict(zip(state, gather_full(list(state.values())), strict=True)), _plain(config, ranks)


def write_plain_lora(folder: Path, state: dict[str, Tensor], config: LoraConfig) -> None:
    """The two files of an adapter, into a folder that exists."""
    # clone: with bias="all" PEFT lists the bias of a module that is saved as a whole under two names.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / WEIGHTS)
    config.save_pretrained(str(folder))


def _plain(config: LoraConfig, ranks: dict[str, int]) -> LoraConfig:
    """The trained adapter's config at the joined ranks and scale 1 (the scale went into the factors)."""
    common = max(ranks.values(), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    return dataclasses.replace(
        config,
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        use_rslora=False,
        init_lora_weights=True,
        inference_mode=True,
    )
