"""LoftQ (2310.08659): a quantised base, and adapters that start at what quantising has lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..algebra.loftq import best_factors, loftq_start
from ..algebra.nf4 import NF4, from_nf4
from ..common.disk_layout import PREFIX
from ..common.errors import ScaloraError
from ..engine.plain_lora import joined_factors
from ..layers.peft_lora import AdapterLayer, find_layers
from ..models.heads import Head
from ..models.load import plain_model
from ..models.origin import origin
from ..models.packed import unpacked
from .lora import lora_model, lora_spectra, save_plain
from .method import Adapted, Family, Method
from .support.nf4_base import refuse_tied, rounded_to_nf4
from .support.targets import find_targets


class LoftqOptions(BaseModel):
    """Options of :class:`Loftq`."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(default=1, ge=1, le=5, description="T: times that quantising and the SVD take turns.")


class Loftq(Method):
    """LoRA on Q, where Q is W − s·B₀A₀ in NF4 and s·B₀A₀ the best approximation of W − Q, whatever alpha is.

    Q is saved with the adapter, packed: repeating the SVD elsewhere might round another way. Where bitsandbytes keeps
    the base, Q is what it made of W, which is one step of the method; W is read once more for that.
    """

    name = "loftq"
    summary = "LoftQ (2310.08659): base in 4 bits (NF4), A and B start at what that has lost"
    family = Family.BASE
    packed = ("nf4",)
    Options = LoftqOptions
    quantises = True

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, LoftqOptions)
        own: Mapping[str, NF4] = {}
        if origin(model).quantization == "nf4":
            if self.options.steps > 1:
                raise ScaloraError(
                    f"method.options.steps is {self.options.steps}, but with quantization: nf4 bitsandbytes has packed "
                    "the base already: leave it out, or set quantization: nf4-rounded"
                )
            peft_model = lora_model(model, self.spec, head)
            set_start_beside_packed(peft_model, plain_model(model, head))
        else:
            names = tuple(name for name, _ in find_targets(model, self.spec, head))
            refuse_tied(model, names)
            peft_model = lora_model(model, self.spec, head)
            own = set_start(peft_model, self.options.steps)
            rounded_to_nf4(model, names)
        start = {layer.name: tuple(t.clone() for t in joined_factors(layer)) for layer in find_layers(peft_model)}

        def gained(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
            (P, Q), (P0, Q0) = joined_factors(layer), start[layer.name]
            return torch.cat([P, -P0], 1), torch.cat([Q, Q0], 1)

        return Adapted(
            peft_model,
            lambda path: save_plain(peft_model, head, path, own=own),
            lambda: lora_spectra(peft_model, gained),
        )


@torch.no_grad()
def set_start(model: PeftModel, steps: int) -> Mapping[str, NF4]:
    """Write Q into the base weights and A₀, B₀ into the adapters; Q as NF4, in the weights' layout, by plain name."""
    own: dict[str, NF4] = {}
    for layer in find_layers(model):
        weight = layer.base.weight
        assert isinstance(weight, Tensor)
        start = loftq_start(weight, layer.rank, steps)
        P, R = (start.R, start.P) if isinstance(layer.base, Conv1D) else (start.P, start.R)
        weight.copy_(from_nf4(start.quantised, weight))
        _start(layer, P, R)
        own[layer.name.removeprefix(PREFIX)] = start.quantised
    return own


@torch.no_grad()
def set_start_beside_packed(model: PeftModel, plain: nn.Module) -> None:
    """Write A₀, B₀ into the adapters of a packed model, of what packing has taken from the weights of ``plain``."""
    for layer in find_layers(model):
        if not hasattr(layer.base.weight, "quant_state"):
            continue  # nothing is lost there
        module: Any = plain.get_submodule(layer.name.removeprefix(PREFIX))
        whole = module.weight.mT if isinstance(module, Conv1D) else module.weight
        _start(layer, *best_factors(whole.float() - unpacked(layer.base).float().to(whole.device), layer.rank))


def _start(layer: AdapterLayer, P: Tensor, R: Tensor) -> None:
    """B₀A₀ with s·B₀A₀ = P Rᵀ."""
    layer.lora_B.copy_(P / layer.scale**0.5)
    layer.lora_A.copy_(R.mT / layer.scale**0.5)


METHODS = (Loftq,)
