"""LoRA-Muon (2606.12921): the product of the factors takes Muon's step, which one gradient of each is enough for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from ..algebra.spectral import spectral_directions
from ..common.errors import ScaloraError
from ..models.heads import Head
from .lora import Lora
from .method import Adapted, Family
from .support.pair_optimizer import PairOptimizer, PairSide


class LoraMuonOptions(BaseModel):
    """Options of :class:`LoraMuon`."""

    model_config = ConfigDict(extra="forbid")

    momentum: float = Field(default=0.95, ge=0, lt=1, description="μ of the running mean of the gradients.")


class LoraMuon(Lora):
    """W moves by the learning rate in every direction of the factors' columns; the head is trained by AdamW."""

    name = "lora-muon"
    summary = "LoRA-Muon (2606.12921): Muon's step for the product BA, from its factors' gradients"
    family = Family.PAIRS
    shards = False
    Options = LoraMuonOptions
    lr_factor = 10.0  # of small models; Adam's step grows with a layer's width, this one is the same at any
    has_alpha = False  # steps are divided by s: only what Trainer clips depends on it

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, LoraMuonOptions)
        adapted, momentum = super().adapt(model, head), self.options.momentum
        adapted.optimizer = lambda arguments: LoraMuonOptimizer(adapted.model, arguments, momentum)
        return adapted


class LoraMuonOptimizer(PairOptimizer):
    """Algorithm 1 of 2606.12921. Keeps one moment of an adapter: half of AdamW's state.

    M ← μM + (1 − μ)g for both factors, and D what :func:`~scalora.algebra.spectral.spectral_directions` makes of them;
    with q = √(1 − ηλ), lora_B ← q·lora_B − η/(2sq)·D, and lora_A likewise. The division by s makes the step of the
    scaled product the published one. A pair without gradients stands still.

    Args:
        model: with LoRA.
        arguments: Trainer's; they give η and λ, the product's weight decay.
        momentum: μ.

    Raises:
        ScaloraError: ηλ is not below 1, or the arguments name an optimizer other than AdamW.
    """

    def __init__(self, model: nn.Module, arguments: TrainingArguments, momentum: float = 0.95) -> None:
        if (shrunk := arguments.learning_rate * arguments.weight_decay) >= 1:
            raise ScaloraError(
                f"training.weight_decay times training.learning_rate is {shrunk}, by which {LoraMuon.name} shrinks "
                "the update at each step: it must be below 1"
            )
        super().__init__(model, arguments)
        self.momentum = momentum

    def step_pairs(self, pairs: Sequence[tuple[PairSide, PairSide]]) -> None:
        alike: dict[object, list[tuple[PairSide, PairSide]]] = defaultdict(list)
        for below, above in pairs:
            alike[below.factor.shape, above.factor.shape, below.factor.dtype, below.factor.device].append(
                (below, above)
            )
        for group in alike.values():
            self._step_alike(group)

    def _step_alike(self, pairs: Sequence[tuple[PairSide, PairSide]]) -> None:
        """Pairs of one shape, dtype and device, at once."""
        below, above = zip(*pairs, strict=True)
        A, B = (torch.stack([side.factor for side in sides]).float() for sides in (below, above))
        M_A, M_B = (torch.stack([self._mean(side) for side in sides]).float() for sides in (below, above))
        directions = spectral_directions(A, B, M_A, M_B)
        for sides, found in ((below, directions.A), (above, directions.B)):
            for side, direction in zip(sides, found, strict=True):
                rate, decay = side.group["lr"], side.group["weight_decay"]
                shrink = math.sqrt(1 - rate * decay)
                side.factor.mul_(shrink).add_(direction.to(side.factor), alpha=-rate / (2 * side.scale * shrink))

    def _mean(self, side: PairSide) -> Tensor:
        """The running mean of a factor's gradients, this one included."""
        if not side.state:
            side.state["momentum_buffer"] = torch.zeros_like(side.gradient)
        return side.state["momentum_buffer"].lerp_(side.gradient, 1 - self.momentum)


METHODS = (LoraMuon,)
