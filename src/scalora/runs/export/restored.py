"""A trained model as it was, whatever its method: its function, its dense difference from the base, and its merge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...common.disk_layout import DELTA, REPLACED, TENSORS
from ...common.errors import ScaloraError
from ...methods import all_methods
from ...methods.support.wrappers import Wrapper, load_wrapped, merge
from ...models import digits  # noqa: F401  (makes its class known to transformers)
from ...models.heads import auto_class, find_heads
from ...models.origin import origin, set_origin
from .artefact import Artefact, read_tensors
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


class RestoredWrapped(Restored):
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
        check_random(artefact, self.model, self.saved)
        try:
            load_wrapped(self.model, artefact.config, self.saved, method.Wrapper)
        except (AttributeError, RuntimeError) as error:
            raise does_not_fit(artefact, base, str(error)) from error
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


class RestoredWhole(Restored):
    """A whole model: what full fine-tuning and accumulate='base' leave."""

    def __init__(self, artefact: Artefact, base: Base) -> None:
        original = base.load()  # is it there, and the right one?
        self.base = base
        self.model = load_whole(artefact)
        set_origin(self.model, origin(original))  # of what started at random there is no difference

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
    try:
        model, report = auto_class(head_of(artefact)).from_pretrained(
            str(artefact.folder), dtype="auto", output_loading_info=True, attn_implementation=attention
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ScaloraError(f"{artefact.folder} is no model that transformers can load: {reason}") from error
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
    replaced = read_tensors(folder / REPLACED) if (folder / REPLACED).is_file() else {}
    check_random(base.artefact, model, replaced)
    for name, value in replaced.items():
        parameters[name].copy_(value)
    return model


def check_random(artefact: Artefact, model: PreTrainedModel, saved: Collection[str]) -> None:
    """Raise ScaloraError where a parameter started at random, whose name in the base is not among those saved."""
    if lost := sorted(origin(model).random.difference(saved)):
        raise ScaloraError(
            f"{artefact.folder} does not hold {lost[0]}, which its base model {model.name_or_path!r} does not hold "
            "either: it was drawn at random for training and is lost, so the trained model cannot be restored; train "
            "again, with that module trained and saved as a whole (PEFT: modules_to_save)"
        )


def does_not_fit(artefact: Artefact, base: Base, reason: str) -> ScaloraError:
    """The message about an artefact that its base model cannot take up, for ``reason``."""
    if "size mismatch" in reason and any(word in reason for word in ("embed", "lm_head", "wte")):
        return ScaloraError(
            f"{artefact.folder} brings embeddings of another size than those of the base model {base.source!r}: its "
            "vocabulary was resized for training; resize it in the same way, save it, and give "
            "it with --base (Python: base=)"
        )
    return ScaloraError(
        f"{artefact.folder} does not fit the base model {base.source!r} ({' '.join(reason.split())[:200]}): give the "
        "right one with --base (Python: base=)"
    )
