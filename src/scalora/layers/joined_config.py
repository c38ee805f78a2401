"""adapter_config.json of trained and accumulated columns together: ranks as the state dict has them, the same scale.

PEFT writes what its configuration object says of itself. Beside an adapter that has accumulated columns the object is
of the class below: in memory its ranks are those that are trained, in writing those of the whole.
"""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from ..common.errors import ScaloraError
from .layout import lora_a
from .lora_config import UNREADABLE
from .peft_lora import WRAPPERS, changes_base
from .stand_in import StandIn


class JoinedConfig(LoraConfig):
    """The LoraConfig of one adapter of one model; alone, or copied, it is an ordinary one."""

    _model: weakref.ref[nn.Module] | None = None
    _adapter = ""  # its name there
    checkpointing = False  # while ScaLoRA's own checkpoint is written, which may hold parts of the model only

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with the ranks of the whole.

        Raises:
            ScaloraError: these ranks on the original base would not be the trained function.
        """
        plain = super().to_dict()
        model = self._model() if self._model is not None else None
        if model is None:
            return plain
        layers = dict(_layers(model, self._adapter))
        if problem := unwritable(self, list(layers.values()), self._adapter):
            if not self.checkpointing:
                raise ScaloraError(problem)
            return plain | {"peft_type": UNREADABLE}
        return plain | self._ranks(layers)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; beside the weights of another model that was given this object, that model's ranks."""
        model = self._model() if self._model is not None else None
        if model is not None and _is_of_another(Path(save_directory), model, self._adapter):
            copy.copy(self).save_pretrained(save_directory, **kwargs)
            return
        super().save_pretrained(save_directory, **kwargs)

    def _ranks(self, layers: dict[str, LoraLayer]) -> dict[str, Any]:
        held = {name: _held(layer, self._adapter) for name, layer in layers.items()}
        if not any(held.values()):
            return {}
        sizes = {name: rank_and_alpha(layer, self._adapter, held[name]) for name, layer in layers.items()}
        # PEFT makes orthogonal columns in pairs only, and would not load an adapter of an odd rank.
        anew = {"init_lora_weights": True} if self.init_lora_weights == "orthogonal" else {}
        return joined_ranks(sizes) | anew

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_model"}


def unwritable(config: LoraConfig, layers: list[LoraLayer], adapter: str, rewritten: bool | None = None) -> str:
    """Why no plain LoRA on the original base is the function of these layers; empty where one is.

    ``rewritten``: whether the layers hold what an initialisation that changes the base cannot start from again; by
    itself where they have accumulated columns.
    """
    if written := [layer.layer_name for layer in layers if isinstance(layer, StandIn) and layer.base_written]:
        return (
            f"layer {written[0]}: accumulate='base' has added its moved differences to the base weights, which no LoRA "
            "adapter of this rank holds: save the whole model (model.merge_and_unload() and save_pretrained)"
        )
    rewritten = any(_held(layer, adapter) for layer in layers) if rewritten is None else rewritten
    if changes_base(config.init_lora_weights) and rewritten:
        return (
            f"init_lora_weights={config.init_lora_weights!r} has changed the base weights, so that a plain LoRA "
            "adapter would not fit the original base: save the whole model (model.merge_and_unload() and "
            "save_pretrained), or train from another initialisation"
        )
    return ""


def joined_ranks(sizes: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """The fields of a LoraConfig that give each layer, by its name in the model, its rank and its lora_alpha."""
    (r, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    others = {_exactly(name): size for name, size in sizes.items() if size != (r, alpha)}
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, (rank, _) in others.items()},
        "alpha_pattern": {name: alpha for name, (_, alpha) in others.items()},
        "use_rslora": False,
    }


def link_config(configs: dict[str, Any], adapter: str, model: nn.Module) -> None:
    """Let ``configs[adapter]`` write the ranks of the whole adapter of ``model``, which PEFT has wrapped.

    The object that the user gave, and may use elsewhere, stays as it is: its place is taken by a copy.
    """
    config = configs[adapter]
    former = getattr(config, "_model", None)
    if former is None or former() is not model or config._adapter != adapter:
        config = copy.copy(config)
        config.__class__ = JoinedConfig
        config._model, config._adapter = weakref.ref(model), adapter
        configs[adapter] = config


def plain_name(name: str) -> str:
    """A module's name without what torch.compile and checkpointing put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def pattern_name(name: str, module: LoraLayer) -> str:
    """What a layer is called in PEFT's patterns; where a bare parameter is adapted, that is the parameter's name."""
    name, parameter = plain_name(name), getattr(module, "parameter_name", None)
    while parameter and name.endswith(".base_layer"):  # those of one module stand in one another
        name = name.removesuffix(".base_layer")
    return f"{name}.{parameter}" if parameter else name


def _layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            yield pattern_name(name, module), module


def _is_of_another(folder: Path, model: nn.Module, adapter: str) -> bool:
    """Whether the weights that lie there have no accumulated columns, while this model's layers have some."""
    weights, layers = folder / SAFETENSORS_WEIGHTS_NAME, [layer for _, layer in _layers(model, adapter)]
    if not weights.is_file() or not any(_held(layer, adapter) for layer in layers):
        return False
    with safe_open(weights, "pt") as file:
        of_A = [key for key in file.keys() if ".lora_A" in key or ".lora_embedding_A" in key]  # noqa: SIM118
        rows = sum(file.get_slice(key).get_shape()[0] for key in of_A)
    return rows == sum(lora_a(layer, adapter).shape[0] for layer in layers)


def _held(layer: LoraLayer, adapter: str) -> int:
    held = layer.held(adapter) if isinstance(layer, StandIn) else None
    return held.used if held else 0


def rank_and_alpha(layer: LoraLayer, adapter: str, held: int = 0) -> tuple[int, float]:
    """Rank and lora_alpha of all columns, ``held`` of them accumulated, at the scale of the trained ones."""
    r = layer.r[adapter]
    alpha = layer.lora_alpha[adapter] * (r + held) / (math.sqrt(r) if layer.use_rslora[adapter] else r)
    return r + held, int(alpha) if float(alpha).is_integer() else alpha


def _exactly(name: str) -> str:
    """A pattern of PEFT's that fits this name alone: without the hook PEFT takes it for the end of any."""
    return "^" + re.escape(name)
