"""Folders of adapters, written and read as wholes; and how a model comes to carry accumulated columns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ...common.disk_layout import BASE_FILE, STATE_FILE
from ...common.errors import ScaloraError
from ...layers.adopt import adopt
from ...layers.joined_config import JoinedConfig, link_config, pattern_name
from ...layers.layout import experts, grown, matrix_keys
from ...layers.lora_config import refuse_former_pair, scale
from ...layers.peft_lora import AdapterLayer
from ...layers.sharding import is_sharded
from ...layers.stand_in import StandIn, stand_in
from ...layers.written_base import whole_adapter
from .peft_tuners import KnowsItsBase, OneAdapter, Relinked, refuse_written, room_for, stand_ins, wrapped

_CHECKPOINT = re.compile(r"checkpoint-\d+")  # as Trainer names them
Beside = Callable[[nn.Module, Path], None]  # (model, folder): what else belongs into, or lies in, an adapter's folder


class WholeFolders(PeftModel):
    """A PeftModel that writes all columns, and whatever else belongs to them, and reads all or nothing."""

    beside: tuple[Beside, Beside] | None = None  # to write and to read what else belongs into a folder
    loaded_from: Mapping[str, Path] = {}

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's.

        Raises:
            ScaloraError: no folder can hold this model as an adapter, or ``state_dict`` holds a part of it only.
        """
        for name in self.peft_config:  # get_peft_model on the base of another model replaces the configurations of both
            if any(name in layer.accumulated or layer.base_written for layer in stand_ins(self)):
                link_config(self.peft_config, name, wrapped(self.base_model))
        # Trainer's checkpoints are read by us; everything else by anybody.
        ours = self.beside is not None and _CHECKPOINT.fullmatch(Path(save_directory).name) is not None
        with _checkpointing(self.peft_config.values(), ours):
            for layer in stand_ins(self):  # refusals come before anything is written
                layer.refuse_averages()
            for config in self.peft_config.values():
                config.to_dict()
            if (state := kwargs.get("state_dict")) is not None:
                kwargs["state_dict"] = _whole_state(self, state)
            super().save_pretrained(save_directory, *args, **kwargs)
        selected = kwargs.get("selected_adapters") or self.active_adapters
        if self.beside is not None and kwargs.get("is_main_process", True) and {*selected} & {*self.active_adapters}:
            self.beside[0](self, Path(save_directory))

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's.

        Raises:
            ScaloraError: the folder is of a run with the other store, one of two, as Scalora once wrote them, or an
                adapter of another scale than that whose place it would take.
        """
        folder = Path(str(model_id))
        refuse_former_pair(folder)
        if (folder / BASE_FILE).is_file():
            if any(len(layer.accumulated) for layer in stand_ins(self)):
                raise ScaloraError(
                    f"{folder} is of a run with accumulate='base', this model is not: give both the same"
                )
        else:
            refuse_written(self, f"an adapter loaded from {folder}")
        _refuse_other_scale(self, adapter_name, folder)
        former = _copied(self, adapter_name) if adapter_name in self.peft_config else {}
        try:
            with whole_adapter():
                result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        except RuntimeError as error:  # torch has put in what fits
            if former:
                with whole_adapter():
                    set_peft_model_state_dict(self, former, adapter_name)
            layers = stand_ins(self)
            if (folder / STATE_FILE).is_file() and layers and not any(len(layer.accumulated) for layer in layers):
                raise ScaloraError(
                    f"{folder} holds the accumulated columns of a run with accumulate='adapter', for which "
                    "accumulate='base' has no place: resume with the same ScaLoraConfig, or start anew from the model "
                    "that scalora.load(folder).merge_and_unload() gives"
                ) from error
            raise
        others = {name: path for name, path in self.loaded_from.items() if name != adapter_name}
        self.loaded_from = {**others, adapter_name: folder} if folder.is_dir() else others
        if self.beside is not None and folder.is_dir():
            self.beside[1](self, folder)
        return result


def carry(model: nn.Module, layers: Sequence[AdapterLayer], room: Sequence[int] | None) -> None:
    """Let these layers, and PEFT's models around them, carry ``room`` accumulated columns per layer; None: not any.

    Raises:
        ScaloraError: they hold what the other store has moved: a checkpoint of both would be neither's.
    """
    for layer in layers:
        module = layer.module
        if isinstance(module, StandIn) and room is not None:
            module.refuse_written("accumulate='adapter'")
        if isinstance(module, StandIn) and room is None and any(map(module.held, module.accumulated)):
            raise ScaloraError(
                f"layer {layer.name}: accumulate='base' would write to the base of an adapter that holds accumulated "
                "columns: go on with accumulate='adapter', or start anew from model.merge_and_unload()"
            )
    for index, layer in enumerate(layers):
        module = stand_in(layer.module)
        module.first, module.layer_name = index == 0, layer.name
        if room is None:
            continue
        if layer.adapter not in module.accumulated:
            module.accumulated[layer.adapter] = room_for(module, layer.adapter, room[index])
        module.widen(layer.adapter, room[index])
    tuners = [module for module in model.modules() if isinstance(module, BaseTuner)]
    for module in tuners:
        adopt(module, OneAdapter if isinstance(module, LoraModel) else KnowsItsBase)
    for module in list(model.modules()):
        if isinstance(module, PeftModel):
            adopt(module, WholeFolders)
    # transformers' own add_adapter() and inject_adapter_in_model() leave the configurations with the model itself.
    for owner in tuners or [m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)][:1]:
        if layers[0].adapter in owner.peft_config:  # pyright: ignore
            link_config(owner.peft_config, layers[0].adapter, wrapped(adopt(owner, Relinked)))  # pyright: ignore


@contextmanager
def _checkpointing(configs: Iterable[Any], on: bool) -> Iterator[None]:
    """Within, a folder may hold what PEFT alone could not make a model of."""
    joined = [config for config in configs if isinstance(config, JoinedConfig)]
    for config in joined:
        config.checkpointing = on
    try:
        yield
    finally:
        for config in joined:
            config.checkpointing = False


def _whole_state(model: PeftModel, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict that the caller gives, with all columns where it holds the trained parameters as they are now."""
    whole = dict(state)
    for name, layer in model.named_modules():
        if not isinstance(layer, StandIn):
            continue
        for adapter in layer.accumulated:
            if (held := layer.held(adapter)) is None:
                continue
            own = f"{name}.accumulated.{adapter}"  # entries of a sharded model, gathered here
            gathered = f"{own}.P" in whole and is_sharded(held.P)  # of another they may be of another time
            P, Qt = (whole[f"{own}.P"], whole[f"{own}.Qt"]) if gathered else held.columns()
            keys, pair = matrix_keys(layer, adapter), (Qt[: held.used], P[:, : held.used])
            for dim, (key, more) in enumerate(zip(keys, pair, strict=True)):
                now, key = layer.matrices(adapter)[dim].detach(), f"{name}.{key}"
                given, all_columns = whole.get(key), now.shape[dim] + held.used * experts(layer)
                if given is None or given.shape[dim] == all_columns:
                    continue  # nothing of it, or all columns
                if given.shape[dim] != now.shape[dim]:
                    raise ScaloraError(
                        f"state_dict: {key} holds {given.shape[dim]} columns, the model {all_columns}: it is "
                        "of another time; leave state_dict out, or pass model.state_dict()"
                    )
                alike = gathered or torch.allclose(given.to(now), now, rtol=0.0, atol=0.0, equal_nan=True)
                if not alike:
                    raise ScaloraError(
                        f"state_dict: {key} holds trained columns of another time, to which the accumulated ones of "
                        "now do not belong: leave state_dict out, or pass model.state_dict()"
                    )
                whole[key] = grown(given, more, dim, experts(layer))
    return whole


def _refuse_other_scale(model: PeftModel, adapter: str, folder: Path) -> None:
    """PEFT puts a folder's matrices into an adapter that is there already, and does not read at which scale."""
    if adapter not in model.peft_config or not (folder / "adapter_config.json").is_file():
        return
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name, layer in wrapped(model.base_model).named_modules():
        if not isinstance(layer, StandIn) or adapter not in layer.scaling or "lora_alpha" not in config:
            continue
        there, here = scale(config, pattern_name(name, layer)), layer.scaling[adapter]
        if not math.isclose(there, here, rel_tol=1e-6):
            raise ScaloraError(
                f"{folder} was saved with scale {there} in layer {name}, where adapter {adapter!r} has {here}: load it "
                "under another name, or as a model of its own (PeftModel.from_pretrained, is_trainable=True)"
            )


def _copied(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """An adapter as it is now; nothing of a sharded model."""
    if any(is_sharded(p) for p in model.parameters()):
        return {}
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}
