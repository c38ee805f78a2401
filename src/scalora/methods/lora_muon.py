"""LoRA-Muon (2606.12921): the product of the factors takes Muon's step, which one gradient of each is enough for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from ..algebra.precision import exact_matmul
from ..algebra.spectral import spectral_directions
from ..common.errors import ScaloraError
from ..engine.groups import Group, grouped
from ..layers.peft_lora import AdapterLayer, find_layers
from ..models.heads import Head
from .lora import lora_model, lora_spectra, save_plain
from .method import Adapted, Method
from .support.others import other_groups

_PLAIN = ("adamw_torch", "adamw_torch_fused")


class LoraMuonOptions(BaseModel):
    """Options of :class:`LoraMuon`."""

    model_config = ConfigDict(extra="forbid")

    momentum: float = Field(default=0.95, ge=0, lt=1, description="μ of the running mean of the gradients.")


class LoraMuon(Method):
    """W moves by the learning rate in every direction of the factors' columns; the head is trained by AdamW."""

    name = "lora-muon"
    summary = "LoRA-Muon (2606.12921): steepest descent of the product in the spectral norm"
    Options = LoraMuonOptions
    lr_factor = 10.0  # of small models; Adam's step grows with a layer's width, this one is the same at any
    has_alpha = False  # steps are divided by s: only what Trainer clips depends on it

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, LoraMuonOptions)
        momentum, peft_model = self.options.momentum, lora_model(model, self.spec, head)

        def optimizer(arguments: TrainingArguments) -> Optimizer:
            optim = OptimizerNames(arguments.optim).value
            if optim not in _PLAIN:
                raise ScaloraError(
                    f"training.optim is {optim!r}, but {self.name} is an optimizer itself, with AdamW for the head: "
                    "leave it out, or choose adamw_torch"
                )
            if (shrunk := arguments.learning_rate * arguments.weight_decay) >= 1:
                raise ScaloraError(
                    f"training.weight_decay times training.learning_rate is {shrunk}, by which {self.name} shrinks the "
                    "update at each step: it must be below 1"
                )
            layers = find_layers(peft_model)
            return LoraMuonOptimizer(
                layers,
                other_groups(peft_model, layers, arguments),
                lr=arguments.learning_rate,
                momentum=momentum,
                weight_decay=arguments.weight_decay,
                betas=(arguments.adam_beta1, arguments.adam_beta2),
                eps=arguments.adam_epsilon,
            )

        return Adapted(
            peft_model,
            lambda path: save_plain(peft_model, head, path),
            lambda: lora_spectra(peft_model),
            optimizer=optimizer,
        )


class LoraMuonOptimizer(Optimizer):
    """Algorithm 1 of 2606.12921 for the adapters of ``layers``, AdamW for ``others``. Keeps one moment of an adapter.

    M ← μM + (1 − μ)g for both factors, and D what :func:`~scalora.algebra.spectral.spectral_directions` makes of them;
    with q = √(1 − ηλ), lora_B ← q·lora_B − η/(2sq)·D, and lora_A likewise. The division by s makes the step of the
    scaled product the published one. A pair without gradients stands still.

    Args:
        layers: whose two matrices are trained.
        others: parameter groups without any of these.
        lr: η.
        momentum: μ.
        weight_decay: λ, of the product, for the adapters; ηλ is below 1.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self,
        layers: Sequence[AdapterLayer],
        others: Sequence[dict[str, Any]] = (),
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.layers = layers
        self.adamw = AdamW([*others], lr=lr, betas=betas, eps=eps) if others else None
        adapters = {"params": [p for layer in layers for p in (layer.lora_A, layer.lora_B)], "momentum": momentum}
        rest = self.adamw.param_groups if self.adamw else []
        super().__init__([adapters, *rest], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for settings in self.param_groups:
            within = {id(p) for p in settings["params"]}
            used = [layer for layer in self.layers if id(layer.lora_A) in within and _has_gradients(layer)]
            for group in grouped(used):
                self._step_group(group, settings)
        if self.adamw:  # on this optimizer's groups and state, which a scheduler or a checkpoint may have replaced
            self.adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
            self.adamw.state = self.state
            self.adamw.step()
        return loss

    def _step_group(self, group: Group, settings: dict[str, Any]) -> None:
        eta, momentum = settings["lr"], settings["momentum"]
        A, B = torch.stack(group.A), torch.stack(group.Bt).mT
        M_A, M_B = (torch.stack([self._mean(p, momentum) for p in params]) for params in (group.A, group.Bt))
        with exact_matmul(A.device):
            directions = spectral_directions(A.float(), B.float(), M_A.float(), M_B.mT.float())
        shrink = math.sqrt(1 - eta * settings["weight_decay"])
        for layer, of_A, of_B in zip(group.layers, directions.A, directions.B, strict=True):
            step = -eta / (2 * layer.scale * shrink)
            for p, direction in ((layer.lora_B, of_A), (layer.lora_A, of_B.mT)):
                p.mul_(shrink).add_(direction.to(p), alpha=step)

    def _mean(self, p: Tensor, momentum: float) -> Tensor:
        """The running mean of a parameter's gradients, this one included."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        assert p.grad is not None
        return state["momentum_buffer"].lerp_(p.grad, 1 - momentum)


def _has_gradients(layer: AdapterLayer) -> bool:
    return layer.lora_A.grad is not None and layer.lora_B.grad is not None


METHODS = (LoraMuon,)
