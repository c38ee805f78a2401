"""A trained model as it was, whatever its method: its function, its dense difference from the base, and its merge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...common.disk_layout import BASE_FILE, DELTA, PREFIX, REPLACED, TENSORS, WEIGHTS
from ...common.errors import ScaloraError
from ...engine.attach import prepare
from ...engine.config import ScaLoraConfig
from ...engine.plain_lora import joined_factors
from ...layers.peft_lora import AdapterLayer, changes_base, find_layers, is_dense
from ...methods import all_methods
from ...methods.peft_any import merged_update
from ...methods.support.wrappers import Wrapper, load_wrapped, merge
from ...models import digits  # noqa: F401  (makes its class known to transformers)
from ...models.heads import auto_class, find_heads
from .artefact import Artefact, read_factors, read_tensors
from .base_model import Base, head_of


class Restored(ABC):
    """A trained model in memory, in evaluation mode."""

    model: Any

    @abstractmethod
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """(Name of a parameter of the base, trained minus original value in float32), in the parameter's layout."""

    @abstractmethod
    def replaced(self) -> dict[str, Tensor]:
        """Parameters that were trained as a whole (heads, modules_to_save), by the base's names."""

    @abstractmethod
    def merge(self) -> PreTrainedModel:
        """One plain model: differences added in float32, rounded once. This object is used up."""


def restore(artefact: Artefact, base: Base) -> Restored:
    """The trained model of an artefact.

    Raises:
        ScaloraError: the artefact and the base do not fit together, or it is of a kind that cannot be restored.
    """
    if artefact.kind == "model":
        return _Whole(artefact, base)
    if artefact.kind == "wrapped":
        return _Wrapped(artefact, base)
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
        owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self.shared = {n for n, p in model.named_parameters(remove_duplicate=False) if owners[id(p)] > 1}
        self.saved = read_tensors(artefact.folder / WEIGHTS)
        try:
            self.model = self._adapted(model, artefact)
        except (RuntimeError, ValueError) as error:
            raise _does_not_fit(artefact, base, str(error)) from error
        expected = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        # PEFT saves the weights of embeddings that are adapted, or were resized, with the adapter.
        own = {name for name in self.saved if name in expected or not (".embed" in name or ".base_layer." in name)}
        if odd := sorted(set(expected) ^ own):
            raise _does_not_fit(artefact, base, f"{odd[0]} is in one of them only")
        self.model.eval()

    def _adapted(self, model: PreTrainedModel, artefact: Artefact) -> PeftModel:
        return PeftModel.from_pretrained(model, str(artefact.folder), is_trainable=True)

    def layers(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """(Name, PEFT's module, difference from its present weight) of every adapted layer."""
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
                if (update := merged_update(module)) is None:
                    raise ScaloraError(
                        f"layer {name} ({type(module).__name__}) cannot be merged: its base weight is quantised or no "
                        "matrix, or PEFT has no merge for it; load the adapter with PEFT as it is"
                    )
                yield name.removeprefix(PREFIX), module, update

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
        return {ours: self.saved[name] for name, ours in names.items() if ours in self.parameters}

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        parted = False
        for name, module, update in list(self.layers()):
            layer: Any = module.get_base_layer()  # pyright: ignore
            weight = (layer.weight.float() + update).to(layer.weight.dtype)
            # A new parameter: one that was shared keeps its old value elsewhere.
            layer.weight = nn.Parameter(weight, requires_grad=False)
            parted = parted or f"{name}.weight" in self.shared
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
        if artefact.moved:
            self._put_back(artefact)
        self.model.eval()

    def _adapted(self, model: PreTrainedModel, artefact: Artefact) -> PeftModel:
        if not artefact.only_ours:
            return super()._adapted(model, artefact)
        fields: dict[str, Any] = artefact.config | {"inference_mode": False}
        adapted = PeftModel(model, LoraConfig(**fields))
        prepare(adapted, ScaLoraConfig(accumulate="base"))  # these layers know the column that PEFT does not
        set_peft_model_state_dict(adapted, dict(self.saved))
        return adapted

    @torch.no_grad()
    def _put_back(self, artefact: Artefact) -> None:
        weights = {_plain_name(name): w for name, w in read_tensors(artefact.folder / BASE_FILE).items()}
        for layer in find_layers(self.model):
            name = _plain_name(layer.name)
            self.start[name] = layer.base_weight.clone()
            layer.base_weight.copy_(weights[name])

    def layers(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        for layer in find_layers(self.model):
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
        moved = {_plain_name(layer.name): layer for layer in find_layers(self.model)} if self.start else {}
        for parameter, update in super().deltas():
            name = parameter.removesuffix(".weight")
            if name in moved:
                update += _stored(moved[name], moved[name].base_weight.float() - self.start[name].float())
            yield parameter, update


class _Wrapped(Restored):
    """Methods with layers of their own."""

    def __init__(self, artefact: Artefact, base: Base) -> None:
        method = all_methods().get(artefact.config["method"])
        if method is None or method.Wrapper is None:
            raise ScaloraError(
                f"{artefact.folder}: this scalora has no method {artefact.config['method']!r} with layers of its own: "
                "load it with the version that wrote it"
            )
        self.saved = read_tensors(artefact.folder / TENSORS)
        self.model = base.load()
        self.parameters = {name for name, _ in self.model.named_parameters()}
        try:
            load_wrapped(self.model, artefact.config, self.saved, method.Wrapper)
        except (AttributeError, RuntimeError) as error:
            raise _does_not_fit(artefact, base, str(error)) from error
        self.model.eval()

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.model.named_modules():
            if isinstance(module, Wrapper):
                weight, bias = module.merged()
                yield f"{name}.weight", weight - module.base.weight.float()
                if bias is not None and not torch.equal(bias, module.base.bias):
                    yield f"{name}.bias", bias - module.base.bias.float()

    def replaced(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.saved.items() if name in self.parameters}

    def merge(self) -> PreTrainedModel:
        return merge(self.model)  # pyright: ignore[reportReturnType]


class _Whole(Restored):
    """A whole model: what full fine-tuning and accumulate='base' leave."""

    def __init__(self, artefact: Artefact, base: Base) -> None:
        base.load()  # is it there, and the right one?
        self.base = base
        self.model = load_whole(artefact)

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        original = dict(self.base.load().named_parameters())
        whole = self.replaced()
        for name, parameter in self.model.named_parameters():
            if name not in whole and not torch.equal(parameter, original[name]):
                yield name, parameter.float() - original[name].float()

    def replaced(self) -> dict[str, Tensor]:
        heads = find_heads(self.model, self.base.head)
        return {f"{head}.{n}": p.detach() for head, module in heads for n, p in module.named_parameters()}

    def merge(self) -> PreTrainedModel:
        return self.model


def load_whole(artefact: Artefact) -> PreTrainedModel:
    """A whole model, in evaluation mode; its base model is not needed.

    Raises:
        ScaloraError: the folder holds more or less than one.
    """
    attention = (artefact.made_by or {}).get("attn_implementation")
    model, report = auto_class(head_of(artefact)).from_pretrained(
        str(artefact.folder), dtype="auto", output_loading_info=True, attn_implementation=attention
    )
    if odd := sorted(str(name) for part in ("missing_keys", "unexpected_keys") for name in report[part]):
        raise ScaloraError(
            f"{artefact.folder} is no plain model ({odd[0]} is missing, or too much): the checkpoints of "
            f"{artefact.method} cannot be restored, only its finished run"
        )
    return model.eval()


@torch.no_grad()
def load_delta(folder: Path, base: Base) -> PreTrainedModel:
    """The base model with a delta export added to it, in evaluation mode; each weight is rounded once.

    Raises:
        ScaloraError: the base model cannot be found or is another one, or a file is damaged.
    """
    model = base.load()
    parameters = dict(model.named_parameters())
    for name, delta in read_tensors(folder / DELTA).items():
        parameters[name].copy_(parameters[name].float() + delta)
    for name, value in (read_tensors(folder / REPLACED) if (folder / REPLACED).is_file() else {}).items():
        parameters[name].copy_(value)
    return model


def _plain_name(name: str) -> str:
    return name.split(PREFIX, 1)[-1]


def _stored(layer: AdapterLayer, update: Tensor) -> Tensor:
    """An m×n difference in the layout of the layer's weight."""
    return update.T if isinstance(layer.base, Conv1D) else update


def _does_not_fit(artefact: Artefact, base: Base, reason: str) -> ScaloraError:
    if "size mismatch" in reason and any(word in reason for word in ("embed", "lm_head", "wte")):
        return ScaloraError(
            f"{artefact.folder} brings embeddings of another size than those of the base model {base.source!r}: its "
            "vocabulary was resized for training; resize it in the same way, save it, and give it with --base"
        )
    return ScaloraError(
        f"{artefact.folder} does not fit the base model {base.source!r} ({' '.join(reason.split())[:200]}): give the "
        "right one with --base"
    )
