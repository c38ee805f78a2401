"""The published rescaling on HiRA's factors: W∘(1 + D + BA), where D takes what an event moves out of BA.

    python -m benchmarks.studies.rescaled_hira recipes/byte-recall.yaml --lr 2e-2,5e-2,1e-1 --seeds 3

With W∘G in place of the gradient every theorem of arXiv 2510.23818 holds for HiRA. D is dense, m×n and float32, so that
no capacity can be what loses. Rates are HiRA's own, some ten times LoRA's. Tuned and run as
:mod:`benchmarks.studies.variants` says. Adds to OUTPUT/rescaled_hira.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from scalora.algebra.gram import gram_products
from scalora.algebra.scaling import ScalingMethod, calibrate, optimal_scaling
from scalora.layers import hira_forward
from scalora.layers.hira_forward import HiraForward
from scalora.methods.method import Adapted
from scalora.methods.peft_methods import Hira

from . import variants

EVERY = 10  # steps from one event to the next, as in scalora-i
VARIANTS: dict[str, ScalingMethod | None] = {
    "as it is": None,
    "rescaled every 10 steps": "paper",
    "columns brought to one norm every 10 steps": "normalize",
}


class Rescaled(TrainerCallback):
    """Events on a model's HiRA layers, with Adam's state carried along."""

    def __init__(self, model: nn.Module, method: ScalingMethod) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, HiraForward)]
        self.method: ScalingMethod = method
        self.stores = {weight_of(layer).data_ptr(): torch.zeros(weight_of(layer).shape) for layer in self.layers}
        self.constants: list[Tensor | None] = [None for _ in self.layers]
        self.steps = 0

    @torch.no_grad()
    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.steps += 1
        if self.steps % EVERY == 0:
            state = getattr(optimizer, "optimizer", optimizer).state  # accelerate wraps it
            self.constants = [self._event(*pair, state) for pair in zip(self.layers, self.constants, strict=True)]

    def _event(self, layer: HiraForward, c: Tensor | None, state: Any) -> Tensor:
        """One layer's; its constant c, which the first event calibrates."""
        (A,), (Bt,) = layer.hira_B.values(), layer.hira_A.values()  # the paper's letters: BA of HiRA is A Bᵀ
        assert A.grad is not None
        assert Bt.grad is not None
        factors = A, Bt.mT, A.grad, Bt.grad.mT
        c = calibrate(gram_products(*factors)) if c is None else c
        alpha, beta, _ = optimal_scaling(*factors, c=c, method=self.method)
        alpha, beta = alpha.to(A), beta.to(A)
        self.stores[weight_of(layer).data_ptr()] += (A * (1 - alpha * beta)) @ Bt
        A *= alpha
        Bt *= beta[:, None]
        for parameter, factor in ((A, beta), (Bt, alpha[:, None])):
            parameter.grad *= factor  # pyright: ignore
            state[parameter]["exp_avg"] *= factor
            state[parameter]["exp_avg_sq"] *= factor**2
        return c

    def adapted(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W∘(1 + D + BA), in place of :func:`scalora.layers.hira_forward._adapted`."""
        return torch.addmm(self.stores[W.data_ptr()] + 1, B, A).mul_(W)


def weight_of(layer: HiraForward) -> Tensor:
    """W (m, n)."""
    return layer.base_layer.weight  # pyright: ignore


@contextmanager
def rescaling(method: ScalingMethod | None) -> Iterator[None]:
    """HiRA has events within, where a method is given."""
    if method is None:
        yield
        return
    adapt = Hira.adapt

    def with_events(self: Hira, *what: Any) -> Adapted:
        found = adapt(self, *what)
        events = Rescaled(found.model, method)
        found.callbacks.append(events)
        formed.side_effect = events.adapted
        return found

    with patch.object(Hira, "adapt", with_events), patch.object(hira_forward, "_adapted") as formed:
        yield


def main() -> None:
    parser = variants.parser(__doc__, VARIANTS, "2e-2,5e-2,1e-1")
    given = parser.parse_args()
    names = variants.chosen(parser, given, list(VARIANTS))

    def trial(name: str, lr: str, seed: int, split: Any) -> float | None:
        with rescaling(VARIANTS[name]):
            return variants.scored(given, lr, seed, split, "method.name=hira")

    key = ", ".join([Path(given.recipe).stem, *given.set])
    variants.run(given, names, given.output / "rescaled_hira.json", key, trial)


if __name__ == "__main__":
    main()
