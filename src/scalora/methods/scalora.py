"""ScaLoRA (2510.23818) and its variants: LoRA plus one callback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from ..common.errors import ScaloraError
from ..engine.chosen import choose_layers
from ..engine.config import ScaLoraConfig
from ..engine.plain_lora import joined_factors
from ..engine.trainer import ScaLoraCallback, refuse_too_few
from ..layers.layout import as_matrix
from ..layers.peft_lora import AdapterLayer, sort_layers
from ..models.heads import Head, loading_lines
from .lora import lora_model, lora_spectra, save_plain
from .method import Adapted, Family, Method, MethodSpec
from .support.start import Start


def _options(**preset: Any) -> type[BaseModel]:
    """ScaLoraConfig's fields with some defaults replaced, as a model that refuses unknown names."""
    found: dict[str, Any] = {
        f.name: (Any, Field(preset.get(f.name, f.default), description=f.metadata["help"]))
        for f in fields(ScaLoraConfig)
    }
    return create_model("ScaLoraOptions", __config__=ConfigDict(extra="forbid"), **found)


class ScaLoraI(Method):
    """Theorem 5 with Theorem 3 as fall-back, every tenth step."""

    name = "scalora-i"
    summary = "ScaLoRA-I (2510.23818): columns rescaled optimally every 10 steps"
    family = Family.OURS
    shards = True
    Options: ClassVar[type[BaseModel]] = _options()

    def __init__(self, spec: MethodSpec) -> None:
        super().__init__(spec)
        try:
            self.config = ScaLoraConfig(**self.options.model_dump())
        except ScaloraError as error:  # which begins with the field
            raise ScaloraError(f"method.options.{error}") from error

    def check(self, arguments: TrainingArguments) -> None:
        super().check(arguments)
        if arguments.max_steps > 0:  # else they are counted when training begins
            refuse_too_few(self.config.of_run(arguments.max_steps), arguments.max_steps)

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        callback = ScaLoraCallback(self.config)
        peft_model = lora_model(model, self.spec, head, self._layers)
        if self.config.accumulate == "adapter":
            return Adapted(
                peft_model,
                lambda path: save_plain(peft_model, head, path),
                lambda: lora_spectra(peft_model),
                [callback],
            )
        start = Start(lambda: _whole_weights(peft_model))
        return Adapted(
            peft_model,
            lambda path: _save_merged(peft_model, head, path),
            start.spectra,
            [callback],
            remember=start.keep,
            used_up=True,
        )

    def _layers(self, model: nn.Module) -> list[AdapterLayer]:
        layers, left = choose_layers(model, self.config.unsupported, sketched=self.config.sketched)
        if left and self.config.accumulate == "base":
            raise ScaloraError(
                f"layer {next(iter(left)).name} would be left as plain LoRA, but accumulate='base' saves one model "
                "without adapters: choose accumulate='adapter'"
            )
        return layers


class ScaLoraMethod(ScaLoraI):
    """As published: at every step."""

    name = "scalora"
    summary = "ScaLoRA (2510.23818): columns rescaled optimally at every step"
    Options = _options(interval=1)


class ScaLoraNonnegative(ScaLoraI):
    """The constrained optimum in every layer."""

    name = "scalora-nonnegative"
    summary = "ScaLoRA-I with the constrained optimum in every layer, no fall-back"
    Options = _options(scaling="nonnegative")


class ScaLoraScalar(ScaLoraI):
    """Theorem 3 only."""

    name = "scalora-scalar"
    summary = "ScaLoRA-I with one factor per matrix (Theorem 3) only"
    Options = _options(scaling="scalar")


class ScaLoraNormalize(ScaLoraI):
    """An ablation: what does optimality itself buy?"""

    name = "scalora-normalize"
    summary = "ablation: every column rescaled to the same norm, no gradient used"
    Options = _options(scaling="normalize")


class ScaLoraRefresh(ScaLoraI):
    """New adapters by Theorem 1, from sketches of the gradient; no column is rescaled."""

    name = "scalora-refresh"
    summary = "Theorem 1 of 2510.23818, from sketches of the gradient: new adapters every 25 steps"
    Options = _options(interval=None, refresh=25)


class WhiteLora(ScaLoraI):
    """Nothing is rescaled, refreshed or accumulated: LoRA, with other steps."""

    name = "white-lora"
    summary = "LoRA with steps in white coordinates: what all inputs or output gradients share counts less"
    Options = _options(interval=None, coordinates="white")


class WhiteScaLora(ScaLoraI):
    """Both: other steps, and columns rescaled by what is optimal for these."""

    name = "white-scalora"
    summary = "ScaLoRA-I in white coordinates: columns rescaled every 10 steps, in the metric of the steps"
    Options = _options(coordinates="white")


class WhiteRefresh(ScaLoraI):
    """Both: other steps, and new adapters along the directions that these steps gain most by."""

    name = "white-refresh"
    summary = "white-lora with new adapters every 50 steps or quarter of a run, by Theorem 1 in the metric of the steps"
    Options = _options(interval=None, refresh="auto", coordinates="white")


@torch.no_grad()
def _whole_weights(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """What the layers multiply by: the base as it is, plus the adapter's product."""
    for layer in sort_layers(model)[0]:
        product = layer.scale * as_matrix(layer.A.detach()).float() @ as_matrix(layer.Bt.detach()).float()
        yield layer.name, layer.base_weight.detach().float() + product


@torch.no_grad()
def _save_merged(model: PeftModel, head: Head, path: Path) -> list[str]:
    """accumulate='base' has changed the base itself, so the whole model is what the user takes away."""
    for layer in sort_layers(model)[0]:  # PEFT would round the difference to the weight's dtype before it adds it
        P, Q = joined_factors(layer)
        layer.base_weight.copy_(layer.base_weight.float() + P.float() @ Q.float().mT)
        layer.module.written = None  # pyright: ignore  # it is the trained model's own weight now
    model.base_model.unload().save_pretrained(str(path))  # pyright: ignore
    return loading_lines(head, path)


METHODS = (
    ScaLoraMethod,
    ScaLoraI,
    ScaLoraNonnegative,
    ScaLoraScalar,
    ScaLoraNormalize,
    ScaLoraRefresh,
    WhiteLora,
    WhiteScaLora,
    WhiteRefresh,
)
