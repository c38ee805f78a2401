"""LoRA as PEFT has it: the yardstick, and the ground that ScaLoRA's variants stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..algebra.lowrank import singular_values
from ..algebra.nf4 import NF4
from ..common import processes
from ..common.errors import ScaloraError
from ..engine.plain_lora import Factors, joined_factors, save_plain_lora
from ..layers.lora_forward import fuse_lora
from ..layers.peft_lora import AdapterLayer, find_layers, sort_layers
from ..models.heads import HEADS, Head, find_heads, peft_loading_lines
from ..models.origin import origin
from .method import Adapted, Family, Method, MethodSpec, Spectrum
from .support.nf4_base import own_lines, write_base_note

README = (
    "This adapter was trained on its base model with `quantization: {}`. PEFT alone would put it on the float weights, "
    "which computes something else. scalora loads it on the values that it was trained on:"
)


class Lora(Method):
    """W + s·BA with B = 0 at the start, s = alpha/r."""

    name = "lora"
    summary = "LoRA (2106.09685): W + s·BA, B and A thin"
    family = Family.PEFT
    shards = True

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        peft_model = lora_model(model, self.spec, head)
        return Adapted(peft_model, lambda path: save_plain(peft_model, head, path), lambda: lora_spectra(peft_model))


def lora_config(spec: MethodSpec, head: Head, **options: Any) -> LoraConfig:
    """A recipe's ``method`` section as PEFT's LoraConfig; ``options`` are further fields of it.

    By the task type PEFT trains and saves a classification head too.
    """
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.scaled_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        task_type=HEADS[head].task_type,
        **options,
    )


def wrap(model: PreTrainedModel, config: PeftConfig, spec: MethodSpec, head: Head) -> PeftModel:
    """PEFT's model around ``model``, which trains and saves as a whole what started at random there.

    Raises:
        ScaloraError: no module matches, or PEFT refuses the configuration; the message says why.
    """
    heads = [name for name, _ in find_heads(model, head)]
    # By the task type PEFT adds its own list, the names of most heads: mostly too late to leave them out of all-linear.
    own = getattr(config, "modules_to_save", None)
    known = HEADS[head].modules if HEADS[head].spared else ()
    if more := [name for name in heads if name not in (*known, *(own or ()))]:
        config.modules_to_save = [*(own or ()), *more]  # pyright: ignore[reportAttributeAccessIssue]
    try:
        peft_model = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if "target" not in reason.lower():
            if "modules_to_save" in reason:
                reason += "; leave what is trained as a whole out of method.target_modules, by naming the others"
            raise ScaloraError(f"method {spec.name}: PEFT refuses it: {reason}") from error
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ScaloraError(
            f"method.target_modules is {spec.target_modules!r}: {reason} Linear modules of this model: "
            f"{', '.join(linear) or 'none'}{spec.targets_hint}"
        ) from error
    assert isinstance(peft_model, PeftModel)
    for name in heads:
        if not isinstance(peft_model.get_base_model().get_submodule(name), ModulesToSaveWrapper):
            raise ScaloraError(
                f"method {spec.name}: {name} starts at random, but PEFT does not train it as a whole with this method: "
                "choose another"
            )
    return peft_model


def lora_model(
    model: PreTrainedModel,
    spec: MethodSpec,
    head: Head,
    find: Callable[[nn.Module], list[AdapterLayer]] = find_layers,
    **options: Any,
) -> PeftModel:
    """A PEFT LoRA model by a recipe's ``method`` section, computed the shorter way; ``options`` go to LoraConfig.

    ``find`` gives the layers that the method acts on, and refuses what it cannot act on.

    Raises:
        ScaloraError: no such modules, or the rank exceeds a weight's dimensions.
    """
    peft_model = wrap(model, lora_config(spec, head, **options), spec, head)
    for layer in find(peft_model):
        m, n = layer.shape
        if spec.rank > min(m, n):
            raise ScaloraError(
                f"method.rank is {spec.rank}, but layer {layer.name} is {m}x{n}: choose {min(m, n)} or less"
            )
    fuse_lora(peft_model)
    return peft_model


def save_plain(
    model: PeftModel,
    head: Head,
    path: Path,
    factors: Factors = joined_factors,
    own: Mapping[str, NF4] | None = None,
) -> list[str]:
    """Save one plain LoRA adapter of these factors; the lines that load it, as :func:`said_beside` has them."""
    save_plain_lora(model, path, factors)
    return said_beside(head, path, model, own)


def said_beside(head: Head, path: Path, model: PeftModel, own: Mapping[str, NF4] | None = None) -> list[str]:
    """The lines that load a saved adapter with plain PEFT; in its README.md too where its base needs more than a name.

    Then the base must be given values, or names of classes, that an adapter has no place for; or it must be quantised.
    ``own`` are base weights that are more than the source's in NF4.
    """
    if not processes.is_first():  # a sharded model is saved by all, and written by one
        return peft_loading_lines(head, path, model)
    if (quantization := origin(model).quantization) != "none":
        write_base_note(path, model, own)
        with Path(path, "README.md").open("a", encoding="utf-8") as file:
            lines = own_lines(Path("path/to/this/folder"))
            file.write("\n".join(["", README.format(quantization), "", "```python", *lines, "```", ""]))
        return own_lines(path)
    if origin(model).options:
        lines = peft_loading_lines(head, Path("path/to/this/folder"), model)
        with Path(path, "README.md").open("a", encoding="utf-8") as file:
            file.write(
                "\n".join(["", "This adapter needs its base model loaded so:", "", "```python", *lines, "```", ""])
            )
    return peft_loading_lines(head, path, model)


def lora_spectra(model: nn.Module, factors: Factors = joined_factors) -> Iterator[tuple[str, Spectrum]]:
    """Singular values of each layer's whole update, trained and accumulated."""
    return layer_spectra(sort_layers(model)[0], factors)


def layer_spectra(layers: Iterable[AdapterLayer], factors: Factors = joined_factors) -> Iterator[tuple[str, Spectrum]]:
    """Those of these layers."""
    for layer in layers:
        P, Q = factors(layer)
        yield layer.name, Spectrum(singular_values(P.float(), Q.float()), P.shape[0], Q.shape[0])


METHODS = (Lora,)
