"""Any method of PEFT's by the name of its type: ``peft:LOHA``, ``peft:LOKR``, ``peft:FOURIERFT``, …"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import BaseModel, ConfigDict, create_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from ..common.errors import ScaloraError
from ..models.heads import HEADS, Head
from .lora import said_beside, wrap
from .method import Adapted, Family, Method, MethodSpec, Spectrum

PEFT_PREFIX = "peft:"
_OTHER = ("ADAPTION_PROMPT", "POLY", "SHADOW", "TRAINABLE_TOKENS")  # prompts, several tasks, a second model, embeddings
_REFUSED = {
    "LILY": "PEFT averages its router over all tokens and rows of a batch, so that what is scored depends on the other "
    "rows, the padding and the tokens to come, and there is nothing to merge",
}
_ALONE = ("ADALORA",)  # its penalty in the loss would count once for each process
_ENDS = ("ADALORA",)  # PEFT saves the ranks it has left, not the importances that they come from
_OURS = {f.name for f in dataclasses.fields(PeftConfig)} | {"target_modules"}  # decided by the recipe, not by options


class PeftMethod(Method):
    """A PEFT method by its config class; PEFT's own defaults hold where neither recipe nor options speak.

    The recipe's rank goes to ``r``, its alpha and dropout, where given, to the fields named so, if the config has them.
    """

    family = Family.PEFT
    packed = ()
    config_class: type[PeftConfig]

    def __init__(self, spec: MethodSpec) -> None:
        super().__init__(spec)
        fields = {f.name for f in dataclasses.fields(self.config_class)}
        kind = self.name.removeprefix(PEFT_PREFIX).lower()
        recipe: dict[str, Any] = {"r": spec.rank}
        recipe |= dict.fromkeys(_alphas(kind), spec.alpha) if spec.alpha else {}
        recipe |= dict.fromkeys(("module_dropout", "lora_dropout", f"{kind}_dropout"), spec.dropout or None)
        self.fields = {name: value for name, value in recipe.items() if name in fields and value is not None}
        self.fields |= self.options.model_dump(exclude_unset=True)
        self._refuse_start(self.fields.get("init_lora_weights"))

    def _refuse_start(self, start: Any) -> None:
        """Raise ScaloraError where a saved adapter would not be on its base, or no start would be made."""
        why = ""
        if isinstance(start, str) and start.startswith("pissa_niter_"):
            why = (
                "takes a random SVD out of the base weights, which loading the adapter could not repeat: use method "
                f"pissa with options {{iterations: {start.removeprefix('pissa_niter_')}}}"
            )
        elif start == "eva":
            why = "needs data that PEFT is not given here, and would be plain LoRA: choose another"
        if why:
            raise ScaloraError(f"method.options.init_lora_weights of {self.name} is {start!r}, which {why}")

    @property
    def alpha(self) -> float | None:
        """The recipe's, where it names one; else PEFT's own default holds."""
        return self.spec.alpha if self.has_alpha else None

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        try:
            config = self.config_class(
                task_type=HEADS[head].task_type,
                target_modules=self.spec.target_modules,  # pyright: ignore[reportCallIssue]
                **self.fields,
            )
        except (TypeError, ValueError) as error:
            raise ScaloraError(f"method.options of {self.name}: {' '.join(str(error).split())}") from error
        peft_model = wrap(model, config, self.spec, head)
        callbacks = [_Allocate()] if hasattr(peft_model.base_model, "update_and_allocate") else []
        return merged_adapted(peft_model, head, callbacks)


class _Allocate(TrainerCallback):
    """AdaLoRA and its like move their budget after each step, while the gradients are still there.

    Raises:
        ScaloraError: gradients are accumulated. PEFT adds its penalty to the loss of each batch, and Trainer divides by
            labels, so that it would count once for each of them.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.gradient_accumulation_steps > 1:
            raise ScaloraError(
                f"training.gradient_accumulation_steps is {args.gradient_accumulation_steps}, so many times this "
                "method's penalty would count: set it to 1, or choose another method"
            )

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)


@cache
def peft_method(name: str) -> type[PeftMethod]:
    """The method class for ``peft:<TYPE>``; its options are the fields of PEFT's config.

    Raises:
        ScaloraError: PEFT has no such type, it trains prompts and not weights, or it cannot be scored.
    """
    kind = name[len(PEFT_PREFIX) :].upper()
    if kind in _REFUSED:
        raise ScaloraError(f"method.name is {name!r}, which is refused: {_REFUSED[kind]}; choose another")
    if kind not in peft_types():
        if kind in {str(other.value) for other in PEFT_TYPE_TO_CONFIG_MAPPING}:
            raise ScaloraError(
                f"method.name is {name!r}, which PEFT has, but it is not supported: it does not adapt the weights of "
                f"modules that one can name; choose one of {', '.join(peft_types())}"
            )
        near = get_close_matches(kind, peft_types(), n=1, cutoff=0.7)
        hint = f"did you mean {PEFT_PREFIX}{near[0]}?" if near else f"choose one of {', '.join(peft_types())}"
        raise ScaloraError(f"method.name is {name!r}, which is no method of this PEFT that adapts weights: {hint}")
    config_class = peft_types()[kind]
    defaults: dict[str, Any] = {
        f.name: (Any, None if f.default is dataclasses.MISSING else f.default)
        for f in dataclasses.fields(config_class)
        if f.name not in _OURS
    }
    options: type[BaseModel] = create_model(f"{kind}Options", __config__=ConfigDict(extra="forbid"), **defaults)
    about = {"name": PEFT_PREFIX + kind, "summary": f"PEFT's {config_class.__name__}", "config_class": config_class}
    about["alone"], about["resumes"] = kind in _ALONE, kind not in _ENDS
    about["has_alpha"] = any(name in config_class.__dataclass_fields__ for name in _alphas(kind.lower()))
    return type(kind, (PeftMethod,), {**about, "Options": options, "__doc__": about["summary"]})


def _alphas(kind: str) -> tuple[str, ...]:
    """What configs call LoRA's alpha."""
    return "alpha", "lora_alpha", f"{kind}_alpha"


def peft_types() -> dict[str, type[PeftConfig]]:
    """PEFT's methods that adapt the weights of modules one can name."""
    return {
        str(kind.value): config
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if not issubclass(config, PromptLearningConfig)
        and "target_modules" in config.__dataclass_fields__
        and kind.value not in (*_OTHER, *_REFUSED)
    }


def merged_adapted(model: PeftModel, head: Head, callbacks: Sequence[TrainerCallback] = ()) -> Adapted:
    """What a PEFT model of any kind hands on: saved by PEFT, measured through its own merge."""

    def save(path: Path) -> list[str]:
        model.save_pretrained(str(path))
        return said_beside(head, path, model)

    return Adapted(model, save, lambda: merged_spectra(model), [*callbacks])


def merged_spectra(model: nn.Module) -> Iterator[tuple[str, Spectrum]]:
    """Singular values of merged minus frozen weight of every adapted matrix, dense."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and (update := merged_update(module)) is not None:
            yield name, Spectrum.of(update)


@torch.no_grad()
def merged_update(layer: BaseTunerLayer) -> Tensor | None:
    """ΔW as PEFT itself would merge it, float32, in the weight's own layout; None where there is no such matrix."""
    weight: Any = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    # A copy is merged: unmerging leaves rounding in the weight, and some methods cannot unmerge at all.
    copied = copy.deepcopy(layer)
    copied.get_base_layer().float()
    try:
        copied.merge()
    except (NotImplementedError, ValueError):  # a method that cannot be merged into the weight has no ΔW
        return None
    merged: Any = copied.get_base_layer().weight
    return merged.float() - weight.float()
