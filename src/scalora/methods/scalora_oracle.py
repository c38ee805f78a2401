"""The unrestricted optimum of ScaLoRA's paper (2510.23818, Theorem 1): an upper reference for small models.

At each event the adapters become the top singular directions of the full gradient, the difference goes to the frozen
part and the optimizer's state of the adapters is thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback

from ..algebra.directions import dense_svd, optimal_adapters
from ..common.errors import ScaloraError
from ..engine.optimizers import forget, innermost
from ..engine.stores import AdapterStore, whole_update
from ..engine.stores.adapter import make_room
from ..layers.peft_lora import find_layers
from ..models.heads import Head
from .lora import lora_model, lora_spectra, save_plain
from .lora_ga import require_two_ranks
from .method import Adapted, Family, Method
from .support.gradients import FullGradients


class OracleOptions(BaseModel):
    """Options of :class:`Oracle`."""

    model_config = ConfigDict(extra="forbid")

    interval: int = Field(default=10, ge=1, description="Optimizer steps from one event to the next.")
    capacity: int | None = Field(
        default=None, ge=1, description="Accumulated columns of a layer; None: whatever holds every update exactly."
    )


class Oracle(Method):
    """Ã = √c·U[:, 𝒜], B̃ = √c·V[:, ℬ] of G = UΣVᵀ at every event; the equality of both functions is kept."""

    name = "scalora-oracle"
    summary = "Theorem 1 of 2510.23818: adapters from the SVD of the full gradient; small models only"
    family = Family.OURS
    packed = ()
    alone = True  # it takes the SVD of gradients that DDP knows nothing of
    Options = OracleOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, OracleOptions)
        peft_model = lora_model(model, self.spec, head)
        require_two_ranks(peft_model, self.spec.rank, self.name)
        layers = find_layers(peft_model)
        capacity = self.options.capacity or max(min(layer.lora_B.shape[0], layer.lora_A.shape[1]) for layer in layers)
        make_room(peft_model, layers, capacity)
        return Adapted(
            peft_model,
            lambda path: save_plain(peft_model, head, path),
            lambda: lora_spectra(peft_model),
            [OracleCallback(peft_model, self.options, capacity)],
        )


class OracleCallback(TrainerCallback):
    """Lets the full gradient be computed on the steps of events, and acts on it before the optimizer does."""

    def __init__(self, model: PeftModel, options: OracleOptions, capacity: int) -> None:
        self.model = model
        self.options = options
        self.capacity = capacity
        self.layers = find_layers(model)
        self.gradients = FullGradients(self.layers)
        # c/s²: the adapters keep the size that lora_A starts with (scaling.calibrate's choice at t = 0).
        self.constants = [float(layer.lora_A.detach().square().sum(1).mean()) for layer in self.layers]
        self.due = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.fp16:
            raise ScaloraError("training.fp16 scales the loss, which scalora-oracle does not undo: use bf16 or float32")
        self.store = AdapterStore(self.model, self.layers, self.capacity)
        self.max_norm = args.max_grad_norm
        self.hook = innermost(kwargs["optimizer"]).register_step_pre_hook(self._before_step)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.due = state.global_step % self.options.interval == 0
        if self.due:
            self.gradients.open()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.due:
            return
        self.due = False
        gradients = self.gradients.close()
        pairs = []
        for layer, c in zip(self.layers, self.constants, strict=True):
            G = gradients.get(layer.name)
            usable = G is not None and bool(torch.isfinite(G).all()) and bool(G.any())
            pairs.append(optimal_adapters(dense_svd(G), layer.rank, c) if usable else None)  # pyright: ignore
        # Compressed, where it must be, while it holds the update so far and no adapter's beginning.
        self.store.receive([whole_update(layer) for layer in self.layers], spare=2)
        for layer, pair in zip(self.layers, pairs, strict=True):
            if pair is None:
                continue
            layer.lora_B.copy_(pair.A)
            layer.lora_A.copy_(pair.B.mT)
            layer.lora_B.grad = (layer.scale * pair.grad_A).to(layer.lora_B.dtype)
            layer.lora_A.grad = (layer.scale * pair.grad_B.mT).to(layer.lora_A.dtype)
            for param in (layer.lora_B, layer.lora_A):
                forget(optimizer, param)
        self.store.receive([whole_update(layer, -1.0) for layer in self.layers])
        if self.max_norm:  # Trainer has clipped the gradients of the old adapters
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.max_norm)


METHODS = (Oracle,)
