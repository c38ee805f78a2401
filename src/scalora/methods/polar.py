"""PoLAR (2506.03133): W + s·B Θ A, B and Aᵀ kept near orthonormal columns by the landing field, Θ free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ..algebra.landing import landing_field, nearest_orthonormal
from ..layers.peft_lora import AdapterLayer, find_layers
from ..models.heads import Head
from .lora import lora_model
from .method import Adapted, Family, Method
from .support.around_steps import AroundSteps, around_lora, gathered


class PolarOptions(BaseModel):
    """Options of :class:`Polar`."""

    model_config = ConfigDict(extra="forbid")

    penalty: float = Field(
        default=5e-3, ge=0, allow_inf_nan=False, description="λ: how strongly B and A are drawn to orthonormality."
    )
    retract: bool = Field(
        default=False, description="Make B and A orthonormal again after each step; published: leave them to λ."
    )


class Polar(Method):
    """LoRA whose lora_B is B Θ, Θ (r×r) zero at the start, so that whatever reads lora_B sees a plain LoRA."""

    name = "polar"
    summary = "PoLAR (2506.03133): BΘA, B and A drawn to orthonormal directions"
    family = Family.AROUND
    Options = PolarOptions
    lr_factor = 10.0

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, PolarOptions)
        peft_model = lora_model(model, self.spec, head)
        for layer in find_layers(peft_model):
            make_polar(layer)
        return around_lora(peft_model, head, LandingCallback(peft_model, self.options))


class Scaled(nn.Module):
    """B ↦ B Θ, for torch's parametrisation of a weight."""

    def __init__(self, B: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(B.new_zeros(B.shape[1], B.shape[1]))

    def forward(self, B: Tensor) -> Tensor:
        """(m, r) → (m, r)."""
        # As a saved adapter has it: under autocast the product would be rounded before it is used.
        with torch.autocast(B.device.type, enabled=False):
            return B @ self.theta


def make_polar(layer: AdapterLayer) -> None:
    """Orthonormal A and B at random, and Θ between them; the layer's function becomes the base's."""
    nn.init.orthogonal_(layer.lora_A)
    nn.init.orthogonal_(layer.lora_B)
    parametrize.register_parametrization(layer.module.lora_B[layer.adapter], "weight", Scaled(layer.lora_B.detach()))


def directions_of(layer: AdapterLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """The trained B (m, r) and A (r, n) of a polar layer."""
    weight = layer.module.lora_B[layer.adapter].parametrizations.weight  # pyright: ignore
    return weight.original, layer.lora_A  # pyright: ignore


class LandingCallback(AroundSteps):
    """Replaces the gradients of B and A by the landing field before each step."""

    def __init__(self, model: PeftModel, options: PolarOptions) -> None:
        super().__init__(model)
        self.options = options

    def before(self) -> None:
        for params in self._alike():
            there = [(X, grad) for X, grad in ((_tall(p), _tall(p.grad)) for p in params if p.grad is not None)]
            if there:
                points, gradients = zip(*there, strict=True)
                fields = landing_field(gathered(points), gathered(gradients), self.options.penalty)
                torch._foreach_copy_(list(gradients), list(fields))

    def after(self) -> None:
        for params in self._alike() if self.options.retract else ():
            points = [_tall(p) for p in params]
            torch._foreach_copy_(points, list(nearest_orthonormal(gathered(points))))

    def _alike(self) -> Iterable[list[Tensor]]:
        """B and A of all layers by shape, so that each is handled at once."""
        alike: dict[object, list[Tensor]] = defaultdict(list)
        for p in (p for layer in self.layers for p in directions_of(layer)):
            alike[p.shape, p.dtype, p.device].append(p)
        return alike.values()


def _tall(X: Tensor) -> Tensor:
    """A view with the long side first, as both have orthonormal columns then."""
    return X.detach() if X.shape[0] >= X.shape[1] else X.detach().mT


METHODS = (Polar,)
