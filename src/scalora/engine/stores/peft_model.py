"""What PEFT's models must know of layers that carry accumulated columns, or of a base that was written to.

Everything layer by layer is done by :class:`scalora.layers.stand_in.StandIn`. What remains are calls that read the two
trained matrices past the layer, calls that take the base for the original one, and folders that are written and read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ...common.disk_layout import BASE_FILE, FORMER_PAIR
from ...common.errors import ScaloraError
from ...layers.accumulated import Accumulated
from ...layers.adopt import adopt
from ...layers.joined_config import JoinedConfig, link_config
from ...layers.lora_config import UNREADABLE
from ...layers.peft_lora import AdapterLayer
from ...layers.stand_in import StandIn, stand_in

_CHECKPOINT = re.compile(r"checkpoint-\d+")  # as Trainer names them
Beside = Callable[[nn.Module, Path], None]  # (model, folder): what else belongs into, or lies in, an adapter's folder


class Relinked(nn.Module):
    """Whatever holds PEFT's configurations; those of a copy speak of the copy."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, config in list(self.peft_config.items()):  # pyright: ignore
            if isinstance(config, JoinedConfig):
                link_config(self.peft_config, name, wrapped(self))  # pyright: ignore


class KnowsItsBase(Relinked, BaseTuner):
    """A tuner of PEFT's that does not take the base for the original one where accumulate='base' has written to it."""

    def disable_adapter_layers(self) -> None:
        refuse_written(self, "disable_adapter()")
        super().disable_adapter_layers()

    def unload(self) -> nn.Module:
        refuse_written(self, "unload()")
        return super().unload()

    def delete_adapter(self, adapter_name: str) -> None:
        refuse_written(self, "delete_adapter()")
        super().delete_adapter(adapter_name)


class OneAdapter(KnowsItsBase, LoraModel):
    """PEFT's LoraModel with layers that stand in for its own."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. An adapter made with a trained one's own configuration is its copy, and gets as many columns."""
        source = self.peft_config[adapter_name]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if isinstance(source, JoinedConfig):
            link_config(self.peft_config, adapter_name, self.model)
            for layer in _stand_ins(self):
                if source._adapter in layer.accumulated and adapter_name in layer.lora_A:
                    held = layer.accumulated[source._adapter]
                    layer.accumulated[adapter_name] = twin = room_for(layer, adapter_name, held.room)  # pyright: ignore
                    twin.used = held.used  # pyright: ignore

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's, of all columns of each adapter.

        Raises:
            ScaloraError: they are more than a layer has singular values, which PEFT would take.
        """
        with all_columns_as_one(self, adapters):
            super().add_weighted_adapter(adapters, *args, **kwargs)

    def _check_add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> tuple[str, int, Any]:
        combination, rank, targets = super()._check_add_weighted_adapter(adapters, *args, **kwargs)
        if combination.endswith("svd"):
            _refuse_narrow_layers(self, adapters, rank)
        return combination, rank, targets


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
            if any(name in layer.accumulated or layer.base_written for layer in _stand_ins(self)):
                link_config(self.peft_config, name, wrapped(self.base_model))
        # Trainer's checkpoints are read by us; everything else by anybody.
        ours = self.beside is not None and _CHECKPOINT.fullmatch(Path(save_directory).name) is not None
        with _checkpointing(self.peft_config.values(), ours):
            written = [config.to_dict() for config in self.peft_config.values()]  # refuses before anything is written
            state = kwargs.get("state_dict")
            if any(config["peft_type"] == UNREADABLE for config in written):
                kwargs["state_dict"] = _with_one_more_column(self.state_dict() if state is None else state)
            elif state is not None:
                kwargs["state_dict"] = _whole_state(self, state)
            super().save_pretrained(save_directory, *args, **kwargs)
        if self.beside is not None and kwargs.get("is_main_process", True):
            self.beside[0](self, Path(save_directory))

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's."""
        folder = Path(str(model_id))
        if (folder / FORMER_PAIR).is_dir():
            raise ScaloraError(
                f"{folder} holds half of an update, the other in {FORMER_PAIR}/, as scalora once wrote it: load it "
                "with the version that wrote it, and save it with scalora.save_plain_lora"
            )
        if (folder / BASE_FILE).is_file():
            if any(len(layer.accumulated) for layer in _stand_ins(self)):
                raise ScaloraError(
                    f"{folder} is of a run with accumulate='base', this model is not: give both the same"
                )
        else:
            refuse_written(self, f"an adapter loaded from {folder}")
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
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
    for module in (layer.module for layer in layers):
        if isinstance(module, StandIn) and room is not None:
            module.refuse_written("accumulate='adapter'")
        if isinstance(module, StandIn) and room is None and any(map(module.held, module.accumulated)):
            raise ScaloraError(
                "accumulate='base' would write to the base of an adapter that holds accumulated columns: go on with "
                "accumulate='adapter', or start anew from model.merge_and_unload()"
            )
    for index, layer in enumerate(layers):
        module = stand_in(layer.module)
        module.first = index == 0
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


def wrapped(owner: nn.Module) -> nn.Module:
    """The model to which the names in PEFT's configurations refer."""
    return owner.model if isinstance(owner, BaseTuner) else owner  # pyright: ignore


def room_for(layer: LoraLayer, adapter: str, room: int) -> Accumulated:
    """No accumulated columns yet, and room for so many."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    assert isinstance(A, Tensor)
    assert isinstance(B, Tensor)
    return Accumulated(B.shape[0], A.shape[1], room, A)


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


def refuse_written(model: nn.Module, what: str) -> None:
    """Refuse what would take the base for the original one where accumulate='base' has written to it."""
    for layer in _stand_ins(model):
        layer.refuse_written(what)


@contextmanager
def all_columns_as_one(tuner: LoraModel, adapters: Sequence[str]) -> Iterator[None]:
    """Within, each of these adapters is a plain LoRA of all its columns, its configuration included."""
    saved: list[Callable[[], None]] = []
    try:
        for adapter in adapters:
            if adapter in tuner.peft_config:
                saved += _put_in_all_columns(tuner, adapter)
        yield
    finally:
        for undo in reversed(saved):
            undo()


def _refuse_narrow_layers(tuner: LoraModel, adapters: Sequence[str], rank: int) -> None:
    held = [layer.accumulated[each] for layer in _stand_ins(tuner) for each in adapters if each in layer.accumulated]
    least = min((min(h.P.shape[0], h.Qt.shape[1]) for h in held if h.used), default=rank)  # pyright: ignore
    if rank > least:
        raise ScaloraError(
            f"adapters of {rank} columns, the accumulated ones included, have more than the {least} singular values of "
            f"the narrowest layer: give svd_rank={least} or less"
        )


def _put_in_all_columns(tuner: LoraModel, adapter: str) -> Iterator[Callable[[], None]]:
    config: Any = tuner.peft_config[adapter]
    written = config.to_dict()
    for layer in _stand_ins(tuner):
        held = layer.held(adapter) if adapter in layer.lora_A else None
        if held is None:
            continue
        P, Qt = held.columns()
        former = layer.lora_A[adapter], layer.lora_B[adapter]
        for place, matrix in (
            (layer.lora_A, torch.cat([former[0].weight.detach(), Qt])),  # pyright: ignore
            (layer.lora_B, torch.cat([former[1].weight.detach(), P], 1)),  # pyright: ignore
        ):
            yield (lambda place=place, module=place[adapter]: place.__setitem__(adapter, module))
            linear = nn.Linear(*reversed(matrix.shape), bias=False, device="meta")
            linear.weight = nn.Parameter(matrix, requires_grad=False)
            place[adapter] = linear
    if written["r"] != config.r or written["rank_pattern"] != config.rank_pattern:
        whole = {name: written[name] for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")}
        former_fields = {name: getattr(config, name) for name in whole}
        yield lambda: vars(config).update(former_fields)
        vars(config).update(whole)


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
            gathered = f"{own}.P" in whole
            P, Qt = (whole[f"{own}.P"], whole[f"{own}.Qt"]) if gathered else held.columns()
            for part, more, dim in (("lora_A", Qt[: held.used], 0), ("lora_B", P[:, : held.used], 1)):
                now = getattr(layer, part)[adapter].weight.detach()
                key = f"{name}.{part}.{adapter}.weight"
                given = whole.get(key)
                if given is None or given.shape[dim] != now.shape[dim]:
                    continue  # nothing of it, or all columns
                if not gathered and not torch.equal(given.to(now), now):
                    raise ScaloraError(
                        f"state_dict: {key} holds trained columns of another time, to which the accumulated ones of "
                        "now do not belong: leave state_dict out, or pass model.state_dict()"
                    )
                whole[key] = torch.cat([given.to(more.dtype), more.to(given.device)], dim)  # pyright: ignore
    return whole


def _with_one_more_column(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict that PEFT alone cannot load into an adapter of these ranks: a column of zeros tells it apart."""
    return {
        name: nn.functional.pad(value, (0, 0, 0, 1) if ".lora_A." in name else (0, 1))
        if ".lora_A." in name or ".lora_B." in name
        else value
        for name, value in state.items()
    }


def _stand_ins(model: nn.Module) -> list[StandIn]:
    return [module for module in model.modules() if isinstance(module, StandIn)]
