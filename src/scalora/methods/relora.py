"""ReLoRA (2307.05695): every K steps the adapter is moved into the frozen part and begins anew."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback
from transformers.training_args import OptimizerNames

from ..common.errors import ScaloraError
from ..engine.optimizer_rules import averages
from ..engine.optimizers import innermost
from ..engine.quantised_state import quantised
from ..engine.stores import AdapterStore, whole_update
from ..engine.stores.adapter import make_room
from ..layers.peft_lora import AdapterLayer, find_layers
from ..models.heads import Head
from .lora import lora_model, lora_spectra, save_plain
from .method import Adapted, Family, Method


class ReLoraOptions(BaseModel):
    """Options of :class:`ReLora`."""

    model_config = ConfigDict(extra="forbid")

    every: int = Field(default=0, ge=0, description="K: steps from one restart to the next; 0: a quarter of the run.")
    warmup: int | None = Field(
        default=None,
        ge=0,
        description="Steps over which the learning rate comes back after a restart; None: K/10, at most 50.",
    )
    pruning: Literal["random", "magnitude"] = Field(
        default="random", description="Which entries of the adapters' optimizer state a restart sets to zero."
    )
    prune: float | None = Field(
        default=None, gt=0, le=1, description="Share set to zero; None: 0.999 at random, 0.9 by magnitude."
    )
    capacity: int | None = Field(
        default=None, ge=1, description="Rank of what is kept exactly; None: 8 times the rank, i.e. 12 restarts."
    )


class ReLora(Method):
    """The sum of several low-rank updates, one after another; the recipe's schedule stays (the paper's: cosine)."""

    name = "relora"
    summary = "ReLoRA (2307.05695): merged and restarted every K steps"
    family = Family.AROUND
    Options = ReLoraOptions

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, ReLoraOptions)
        peft_model = lora_model(model, self.spec, head)
        make_room(peft_model, find_layers(peft_model), self.options.capacity)
        return Adapted(
            peft_model,
            lambda path: save_plain(peft_model, head, path),
            lambda: lora_spectra(peft_model),
            [ReLoraCallback(peft_model, self.options)],
        )


class ReLoraCallback(TrainerCallback):
    """Restarts after steps K, 2K, … but the last, and scales the learning rate of the steps that follow."""

    def __init__(self, model: PeftModel, options: ReLoraOptions) -> None:
        self.model = model
        self.options = options
        self.step = 0  # optimizer steps taken
        self.hooks: list[Any] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.every = self.options.every or max(1, state.max_steps // 4)
        self.warmup = min(50, self.every // 10) if self.options.warmup is None else self.options.warmup
        if self.warmup >= self.every:
            raise ScaloraError(
                f"method.options.warmup is {self.warmup}, but relora restarts every {self.every} steps: choose less"
            )
        self.layers = find_layers(self.model)
        self.store = AdapterStore(self.model, self.layers, self.options.capacity)
        self.optimizer = innermost(kwargs["optimizer"])
        if averages(self.optimizer):
            raise ScaloraError(
                f"training.optim is {OptimizerNames(args.optim).value!r}, which evaluates an average of points, and a "
                "restart keeps the function of one point only: use adamw_torch"
            )
        self.step = state.global_step
        self.hooks = [
            self.optimizer.register_step_pre_hook(self._lower),
            self.optimizer.register_step_post_hook(self._restore),
        ]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step = state.global_step
        if self.step % self.every == 0 and self.step < state.max_steps:
            self._restart(args.seed + self.step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def _restart(self, seed: int) -> None:
        # A generator of its own: dropout and the order of the data stay what they are without restarts.
        generator = torch.Generator(self.layers[0].lora_B.device).manual_seed(seed)
        self.store.receive([whole_update(layer) for layer in self.layers])
        for layer in self.layers:
            restart_factors(layer, generator)
            for param in (layer.lora_B, layer.lora_A):
                prune_state(self.optimizer, param, self.options.pruning, self._share, generator)

    @property
    def _share(self) -> float:
        return self.options.prune or (0.999 if self.options.pruning == "random" else 0.9)

    def _lower(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.rates = [group["lr"] for group in optimizer.param_groups]
        factor = rewarmup(self.step, self.every, self.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate


def rewarmup(step: int, every: int, warmup: int) -> float:
    """Factor of the learning rate of step number ``step`` (from 0): 0, 1/warmup, … after each restart, else 1."""
    since = step % every
    return since / warmup if step >= every and since < warmup else 1.0


def restart_factors(layer: AdapterLayer, generator: torch.Generator) -> None:
    """LoRA's initial state: lora_A Kaiming-uniform with a = √5, lora_B zero."""
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5), generator=generator)
    nn.init.zeros_(layer.lora_B)


def prune_state(
    optimizer: Optimizer, param: Tensor, pruning: str, share: float, generator: torch.Generator | None = None
) -> None:
    """Set a share of every moment of ``param`` to zero, at random or the smallest; step counters stay.

    Moments in few bits are read and written back with one rounding.
    """
    state = optimizer.state.get(param, {})
    for key, entry in state.items():
        if not isinstance(entry, Tensor) or entry.shape[-param.ndim :] != param.shape:
            continue
        # AdEMAMix keeps two in one.
        for part in quantised(state, key) or (entry.unbind(0) if entry.ndim > param.ndim else [entry]):
            moment = part if isinstance(part, Tensor) else part.read()
            keep = _kept(moment, pruning, share, generator)
            if isinstance(part, Tensor):
                part.mul_(keep)
            else:
                part.scale_(keep)


def _kept(moment: Tensor, pruning: str, share: float, generator: torch.Generator | None) -> Tensor:
    if pruning == "random":
        return torch.rand(moment.shape, generator=generator, device=moment.device) > share
    size = moment.abs()
    return size > size.float().quantile(share)


METHODS = (ReLora,)
