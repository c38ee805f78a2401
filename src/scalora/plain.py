"""One plain LoRA out of the trained and the accumulated adapter: loads wherever LoRA loads, without scalora."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import ACCUMULATED, AdapterLayer, find_layers
from .errors import ScaloraError
from .files import replace_folder
from .sharded import is_writer, whole
from .stores.tuner import find_peft_model

Factors: TypeAlias = Callable[[AdapterLayer], tuple[Tensor, Tensor]]  # of a layer's whole update P Qᵀ


def joined_factors(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """P (m, k) and Q (n, k), detached, with P Qᵀ = the layer's whole low-rank update, trained and accumulated."""
    A, Bt = whole([layer.A.detach(), layer.Bt.detach()])
    P, Q = [A * layer.scale], [Bt.mT]
    if ACCUMULATED in layer.module.lora_A:
        A, Bt = whole([layer.frozen().A.detach(), layer.frozen().Bt.detach()])
        used = A.any(0) & Bt.any(1)
        P.append(A[:, used].to(P[0]))
        Q.append(Bt[used].mT.to(Q[0]))
    return torch.cat(P, 1), torch.cat(Q, 1)


def save_plain_lora(model: nn.Module, path: str | Path, factors: Factors = joined_factors) -> Path:
    """Save trained and accumulated adapter as one plain PEFT LoRA adapter with the same function.

    Of several processes the first one writes. With a model sharded by FSDP2 every process must call it.

    Args:
        model: a model trained with accumulate="adapter" (or plain LoRA, which is saved as it is).
        path: the folder to write; replaced as a whole once everything is on disk.
        factors: what the update of each layer is, where it is more than these two adapters.

    Returns:
        The folder. ``PeftModel.from_pretrained(base, path)`` loads it without scalora.

    Raises:
        ScaloraError: the model holds no trained LoRA adapter, or one whose initialisation changed the base weights.
    """
    layers = find_layers(model)
    peft_model = find_peft_model(model)
    adapter = layers[0].adapter
    config = peft_model.peft_config[adapter]
    assert isinstance(config, LoraConfig)
    if factors is joined_factors and _changes_base(config.init_lora_weights):
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
    state = dict(zip(state, whole(list(state.values())), strict=True))

    folder, temporary = Path(path), Path(f"{path}.tmp")
    if not is_writer():
        return folder
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # clone: with bias="all" PEFT lists the bias of a module that is saved as a whole under two names.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, temporary / "adapter_model.safetensors")
    _plain(config, ranks).save_pretrained(str(temporary))
    replace_folder(temporary, folder)
    return folder


def _changes_base(init: bool | str) -> bool:
    """Whether PEFT has taken the initial adapter out of the base weights."""
    return isinstance(init, str) and init.lower().split("_niter_")[0] in ("pissa", "olora", "corda", "loftq", "lora_ga")


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
