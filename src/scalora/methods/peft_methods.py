"""PEFT's methods that deserve a name of their own: rsLoRA, DoRA, PiSSA and HiRA, each as PEFT has it."""

from __future__ import annotations

import torch
from peft import HiraConfig
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from ..engine.plain_lora import joined_factors
from ..layers.hira_forward import fuse_hira
from ..layers.peft_lora import AdapterLayer, find_layers
from ..models.heads import HEADS, Head
from .lora import lora_config, lora_model, lora_spectra, save_plain, wrap
from .method import Adapted, Family, Method
from .peft_any import merged_adapted


class RsLora(Method):
    """W + s·BA with s = alpha/√r."""

    name = "rslora"
    summary = "rank-stabilised LoRA (2312.03732): s = alpha/√r, not alpha/r"
    family = Family.PEFT
    shards = True

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        peft_model = lora_model(model, self.spec, head, use_rslora=True)
        return Adapted(peft_model, lambda path: save_plain(peft_model, head, path), lambda: lora_spectra(peft_model))


class Dora(Method):
    """m ∘ (W + s·BA)/‖W + s·BA‖ with a trained magnitude m per output row."""

    name = "dora"
    summary = "DoRA (2402.09353): LoRA of the direction, a trained magnitude per row"
    family = Family.PEFT
    packed = ("nf4",)

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        return merged_adapted(wrap(model, lora_config(self.spec, head, use_dora=True), self.spec, head), head)


class PissaOptions(BaseModel):
    """Options of :class:`Pissa`."""

    model_config = ConfigDict(extra="forbid")

    iterations: int = Field(default=0, ge=0, description="0: exact SVD; else steps of PEFT's fast, randomised one.")


class Pissa(Method):
    """LoRA that starts at the top r singular directions of W, which are taken out of the frozen part.

    PEFT rewrites the base weights to that end. What is saved is the equivalent plain LoRA of rank 2r on the original
    ones, s·BA − s·B₀A₀, so that a saved adapter never depends on repeating the SVD.
    """

    name = "pissa"
    summary = "PiSSA (2404.02948): A and B start at the top singular directions of W"
    family = Family.START
    packed = ()
    Options = PissaOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, PissaOptions)
        steps = self.options.iterations
        peft_model = lora_model(model, self.spec, head, init_lora_weights=f"pissa_niter_{steps}" if steps else "pissa")
        start = {layer.name: tuple(t.clone() for t in joined_factors(layer)) for layer in find_layers(peft_model)}

        def factors(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
            (P, Q), (P0, Q0) = joined_factors(layer), start[layer.name]
            return torch.cat([P, -P0.to(P)], 1), torch.cat([Q, Q0.to(Q)], 1)

        return Adapted(
            peft_model,
            lambda path: save_plain(peft_model, head, path, factors),
            lambda: lora_spectra(peft_model, factors),
        )


class Hira(Method):
    """W + W∘(BA), B = 0 at the start; it has no alpha. PEFT's layers, computed in one product where they are plain."""

    name = "hira"
    summary = "HiRA (ICLR 2025): W + W∘(BA), an entrywise product of high rank"
    family = Family.PEFT
    packed = ("nf4",)
    lr_factor = 10.0
    has_alpha = False

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        config = HiraConfig(
            r=self.spec.rank,
            hira_dropout=self.spec.dropout,
            target_modules=self.spec.target_modules,
            task_type=HEADS[head].task_type,
        )
        peft_model = wrap(model, config, self.spec, head)
        fuse_hira(peft_model)
        return merged_adapted(peft_model, head)


METHODS = (RsLora, Dora, Pissa, Hira)
