"""Methods with layers of their own: put around linear layers, saved, loaded again, and merged into them."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...common.disk_layout import SETTINGS, TENSORS
from ...common.errors import ScaloraError
from ...common.files import replace_folder
from ...models.heads import HEADS, Head, find_heads
from ...models.origin import origin
from ..method import MethodSpec, Spectrum
from .nf4_base import write_base_note
from .targets import find_targets


class Wrapper(nn.Module, ABC):
    """A frozen linear layer with something trained around it, whose function stays linear.

    Its own parameters are float32, as PEFT's adapters are, whatever the frozen weight's dtype is.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:  # some models look at a layer's weight for its dtype and device
        return self.base.weight

    @abstractmethod
    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight (m×n) and bias (m) of the one linear layer with the same function, float32."""


def wrap_linear(
    model: PreTrainedModel, spec: MethodSpec, head: Head, make: Callable[[nn.Linear], Wrapper]
) -> dict[str, Wrapper]:
    """Put a wrapper around every targeted module, in place; what they train, and the head, is all that is trained.

    Raises:
        ScaloraError: nothing is targeted, or something that is not a plain linear layer.
    """
    targets = find_targets(model, spec, head)
    for name, module in targets:
        if type(module) is not nn.Linear:
            raise ScaloraError(
                f"method {spec.name} adapts plain linear layers only, but {name} is a {type(module).__name__}: leave "
                "it out of method.target_modules, or choose lora, relora or hira, which take it"
            )
    model.requires_grad_(False)
    wrappers = {name: make(module).to(module.weight.device) for name, module in targets if type(module) is nn.Linear}
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper)
    for _, module in find_heads(model, head):
        module.requires_grad_(True)
    return wrappers


def merge(model: nn.Module) -> nn.Module:
    """Replace every wrapper by the linear layer that equals it, in place; the model is returned."""
    for name, wrapper in [(n, m) for n, m in model.named_modules() if isinstance(m, Wrapper)]:
        weight, bias = wrapper.merged()
        linear = wrapper.base
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        model.set_submodule(name, linear)
    return model


@torch.no_grad()
def wrapped_spectra(wrappers: dict[str, Wrapper]) -> Iterator[tuple[str, Spectrum]]:
    """Singular values of merged minus frozen weight, dense."""
    for name, wrapper in wrappers.items():
        update = wrapper.merged()[0] - wrapper.base.weight.float()
        yield name, Spectrum.of(update)


def save_wrapped(
    model: PreTrainedModel, wrappers: dict[str, Wrapper], head: Head, path: Path, method: str, **settings: Any
) -> list[str]:
    """Save the wrappers' own tensors and the head; the lines that load them together with the base model.

    ``settings`` are what the wrappers were made with. The folder is replaced as a whole once everything is on disk.
    """
    modules = {**{n: [p for p in w.named_parameters() if not p[0].startswith("base.")] for n, w in wrappers.items()},
               **{n: list(m.named_parameters()) for n, m in find_heads(model, head)}}  # fmt: skip
    tensors = {f"{n}.{key}": p.detach().cpu().contiguous() for n, params in modules.items() for key, p in params}
    about = {
        "method": method,
        "base": model.name_or_path,
        "head": head,
        "base_config": dict(origin(model).overrides),
        "num_labels": model.config.num_labels if HEADS[head].labelled else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "modules": list(wrappers),
        "settings": settings,
    }
    temporary = Path(f"{path}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / TENSORS)
    if origin(model).quantization != "none":
        write_base_note(temporary, model)
    (temporary / SETTINGS).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    replace_folder(temporary, Path(path))
    return ["import scalora", f"model = scalora.load({str(path)!r})"]


def load_wrapped(
    model: PreTrainedModel, about: dict[str, Any], tensors: dict[str, Tensor], make: Callable[..., nn.Module]
) -> None:
    """Inverse of :func:`save_wrapped`, on the plain base model, in place.

    Args:
        model: the base model with the head that was trained.
        about: what was saved as settings.
        tensors: what was saved beside them.
        make: gives a wrapper for a linear layer and the wrapper's settings.

    Raises:
        AttributeError, RuntimeError: the base model is another one.
    """
    for name in about["modules"]:
        model.set_submodule(name, make(model.get_submodule(name), **about["settings"]))
    if unexpected := model.load_state_dict(tensors, strict=False).unexpected_keys:
        raise RuntimeError(f"there is no {unexpected[0]}")
