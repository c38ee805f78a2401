"""LoRA-GA (2407.05000), as published: LoRA that starts along the first full gradient."""

from __future__ import annotations

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from ..common.errors import ScaloraError
from ..engine.stores.adapter import make_room
from ..layers.peft_lora import find_layers
from ..models.heads import Head
from .lora import lora_model, lora_spectra, save_plain
from .method import Adapted, Family, Method
from .support.gradients import mean_gradients


class LoraGaOptions(BaseModel):
    """Options of :class:`LoraGa`."""

    model_config = ConfigDict(extra="forbid")

    gamma: float = Field(default=16.0, gt=0, description="γ: A and B start at out^¼/√γ times orthonormal vectors.")
    batches: int = Field(default=8, ge=1, description="Micro-batches whose mean gradient is taken.")
    rslora: bool = Field(default=False, description="s = alpha/√r, as in the paper's experiments, in place of alpha/r.")


class LoraGa(Method):
    """A = Vᵀ[:r], B = U[:, r:2r] of the gradient's SVD; s·B₀A₀ is taken out of the frozen part.

    W itself is not written: −s·B₀A₀ are r frozen columns beside the adapter, so the model's function starts unchanged.
    What is saved is one plain LoRA of rank 2r on the original weights.
    """

    name = "lora-ga"
    summary = "LoRA-GA (2407.05000): A and B start along the first full gradient"
    family = Family.START
    packed = ()
    Options = LoraGaOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, LoraGaOptions)
        peft_model = lora_model(model, self.spec, head, use_rslora=self.options.rslora)
        require_two_ranks(peft_model, self.spec.rank, self.name)
        make_room(peft_model, find_layers(peft_model), self.spec.rank, slots=0)
        return Adapted(
            peft_model,
            lambda path: save_plain(peft_model, head, path),
            lambda: lora_spectra(peft_model),
            [LoraGaCallback(peft_model, self.options)],
        )


class LoraGaCallback(TrainerCallback):
    """Sets the adapters when training begins, from a few batches of its data."""

    def __init__(self, model: PeftModel, options: LoraGaOptions) -> None:
        self.model = model
        self.options = options

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step > 0:
            return
        layers = find_layers(self.model)
        gradients = mean_gradients(self.model, layers, kwargs["train_dataloader"], args, self.options.batches)
        with torch.no_grad():
            for layer in layers:
                if layer.name not in gradients:  # a layer that the loss does not depend on stays as LoRA begins
                    continue
                B, A = initial_factors(gradients[layer.name], layer.rank, self.options.gamma, args.seed)
                layer.lora_B.copy_(B)
                layer.lora_A.copy_(A)
                layer.accumulated.put(-B, A)


def initial_factors(G: Tensor, rank: int, gamma: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """B (m×r) and A (r×n) in LoRA's naming, from the gradient G (m×n), with the published randomised SVD."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        U, _, V = torch.svd_lowrank(G, q=min(4 * rank, *G.shape), niter=4)
    size = G.shape[0] ** 0.25 / gamma**0.5
    return size * U[:, rank : 2 * rank], size * V[:, :rank].T


def require_two_ranks(model: PeftModel, rank: int, method: str) -> None:
    """2r singular directions of the gradient are needed, r for each factor."""
    for layer in find_layers(model):
        least = min(layer.lora_B.shape[0], layer.lora_A.shape[1])
        if 2 * rank > least:
            raise ScaloraError(
                f"method.rank is {rank}, but {method} needs twice as many directions and layer {layer.name} has "
                f"{least}: choose {least // 2} or less"
            )


METHODS = (LoraGa,)
