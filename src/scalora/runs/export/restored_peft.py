"""The trained model of an artefact; of PEFT's methods, LoRA with what it accumulated among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...common.disk_layout import BASE_FILE, PREFIX, WEIGHTS
from ...common.errors import ScaloraError
from ...engine.attach import prepare
from ...engine.config import ScaLoraConfig
from ...engine.plain_lora import joined_factors
from ...layers.fingerprint import base_fingerprint
from ...layers.layout import in_weight_layout
from ...layers.peft_lora import AdapterLayer, changes_base, is_dense, sort_layers
from ...layers.stand_in import StandIn
from ...layers.written_base import whole_adapter
from ...methods.peft_any import merged_update
from ...models import digits  # noqa: F401  (makes its class known to transformers)
from ...models.packed import is_packed
from .artefact import Artefact, read_factors, read_tensors
from .base_model import Base
from .restored import Restored, RestoredWhole, RestoredWrapped, check_random, does_not_fit


def restore(artefact: Artefact, base: Base) -> Restored:
    """The trained model of an artefact.

    Raises:
        ScaloraError: the artefact and the base do not fit together, or it is of a kind that cannot be restored.
    """
    if artefact.kind == "model":
        return RestoredWhole(artefact, base)
    if artefact.kind == "wrapped":
        return RestoredWrapped(artefact, base)
    return _Lora(artefact, base) if artefact.kind == "lora" else _Peft(artefact, base)


class _Peft(Restored):
    """Any PEFT method that can be merged, through PEFT's own merge."""

    def __init__(self, artefact: Artefact, base: Base) -> None:
        initial = artefact.config.get("init_lora_weights")
        if initial is not None and changes_base(initial):
            raise ScaloraError(
                f"{artefact.folder}: init_lora_weights={initial!r} has rewritten the base weights, so this adapter "
                "alone is not the model: export the finished run, whose adapter/ is on the original ones"
            )
        model = base.load()
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.tied = _tied(model)
        self.shared = {name for names in self.tied for name in names}
        self.saved = read_tensors(artefact.folder / WEIGHTS)
        check_random(artefact, model, {name.removeprefix(PREFIX) for name in self.saved})
        try:
            self.model = self._adapted(model, artefact)
        except (RuntimeError, ValueError) as error:
            raise does_not_fit(artefact, base, str(error)) from error
        expected = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        # PEFT saves the weights of embeddings that are adapted, or were resized, with the adapter.
        own = {name for name in self.saved if name in expected or not (".embed" in name or ".base_layer." in name)}
        if odd := sorted(set(expected) ^ own):
            raise does_not_fit(artefact, base, f"{odd[0]} is in one of them only")
        self.model.eval()

    def _adapted(self, model: PreTrainedModel, artefact: Artefact) -> PeftModel:
        return PeftModel.from_pretrained(model, str(artefact.folder), is_trainable=True)

    def layers(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """(Name, PEFT's module, difference from its present weight) of every adapted layer."""
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
                yield name.removeprefix(PREFIX), *_merged(name, module)

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        for name, _, update in self.layers():
            if f"{name}.weight" in self.shared:
                raise ScaloraError(
                    f"layer {name} shares its weight with another, which a difference would change too: use --to "
                    "merged, which parts them, or --to lora"
                )
            yield f"{name}.weight", update

    def replaced(self) -> dict[str, Tensor]:
        names = {name: name.removeprefix(PREFIX) for name in self.saved}
        found = {ours: self.saved[name] for name, ours in names.items() if ours in self.parameters}
        for tied in self.tied:
            values = [found[name] for name in tied if name in found]
            if values and (len(values) < len(tied) or not all(torch.equal(value, values[0]) for value in values)):
                raise ScaloraError(
                    f"{next(name for name in tied if name in found)} was trained as a whole, but {' and '.join(tied)} "
                    "are tied, so that a difference would change both: use --to merged, which parts them, or --to lora"
                )
            for name in tied[1:]:
                found.pop(name, None)
        return found

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        parted = False
        for name, module, update in list(self.layers()):
            layer: Any = module.get_base_layer()  # pyright: ignore
            weight = (layer.weight.float() + update).to(layer.weight.dtype)
            # A new parameter: one that was shared keeps its old value elsewhere.
            layer.weight = nn.Parameter(weight, requires_grad=False)
            parted = parted or f"{name}.weight" in self.shared
        for module in self.model.modules():
            if isinstance(module, StandIn):
                module.written = None  # its weight is the trained model's own now
        model = self.model.base_model.unload()
        if parted:
            model.config.tie_word_embeddings = False
        return model


class _Lora(_Peft):
    """Plain LoRA, with what was accumulated in its own columns or in the base weights."""

    def __init__(self, artefact: Artefact, base: Base) -> None:
        if artefact.in_parts:
            read_factors(artefact)  # do its parts belong together?
        super().__init__(artefact, base)
        self.start: dict[str, Tensor] = {}  # base weights that accumulate='base' has changed
        if artefact.state is not None and not is_packed(base.quantization):  # of which names alone were counted
            written = [layer.base.weight for layer in sort_layers(self.model)[0]] if artefact.only_ours else []
            if base_fingerprint(self.model, written) != artefact.state["base"]:  # pyright: ignore
                raise does_not_fit(artefact, base, "its weights are others than those of the training")
        if artefact.moved:
            self._put_back(artefact)
        self.model.eval()

    def _adapted(self, model: PreTrainedModel, artefact: Artefact) -> PeftModel:
        if not artefact.only_ours:
            return super()._adapted(model, artefact)
        fields: dict[str, Any] = artefact.config | {"inference_mode": False}
        adapted = PeftModel(model, LoraConfig(**fields))
        prepare(adapted, ScaLoraConfig(accumulate="base"))  # these layers know the column that PEFT does not
        with whole_adapter():
            set_peft_model_state_dict(adapted, dict(self.saved))
        return adapted

    @torch.no_grad()
    def _put_back(self, artefact: Artefact) -> None:
        weights = {_plain_name(name): w for name, w in read_tensors(artefact.folder / BASE_FILE).items()}
        for layer in sort_layers(self.model)[0]:
            name = _plain_name(layer.name)
            self.start[name] = layer.base_weight.clone()
            layer.base_weight.copy_(weights[name])

    def layers(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        exact, others = sort_layers(self.model)
        for layer in others:
            yield _plain_name(layer.name), *_merged(layer.name, layer.module)
        for layer in exact:
            if not is_dense(layer):
                raise ScaloraError(
                    f"layer {layer.name} ({type(layer.base).__name__}) is quantised or no ordinary matrix: use --to "
                    "lora"
                )
            name, module = _plain_name(layer.name), layer.module
            P, Q = joined_factors(layer)
            assert isinstance(module, nn.Module)
            yield name, module, _stored(layer, P.float() @ Q.float().mT)

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        moved = {_plain_name(layer.name): layer for layer in sort_layers(self.model)[0]} if self.start else {}
        for parameter, update in super().deltas():
            name = parameter.removesuffix(".weight")
            if name in moved:
                update += _stored(moved[name], moved[name].base_weight.float() - self.start[name].float())
            yield parameter, update


def _merged(name: str, module: Any) -> tuple[nn.Module, Tensor]:
    """A layer, and what PEFT's own merge adds to its weight."""
    if (update := merged_update(module)) is None:
        raise ScaloraError(
            f"layer {name} ({type(module).__name__}) cannot be merged: its base weight is quantised or no matrix, or "
            "PEFT has no merge for it; load the adapter with PEFT as it is"
        )
    return module, update


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of the same parameter, for each that has several; first the one that ``named_parameters`` gives."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _plain_name(name: str) -> str:
    return name.split(PREFIX, 1)[-1]


def _stored(layer: AdapterLayer, update: Tensor) -> Tensor:
    """An m×n difference in the layout of the layer's weight."""
    return in_weight_layout(layer.module, layer.adapter, update)
