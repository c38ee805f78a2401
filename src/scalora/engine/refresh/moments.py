"""The metric of every layer's inputs, looked at for one step of each window (:mod:`layers.input_sketch`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...algebra.directions import range_basis
from ...algebra.metric import InputMetric, no_metric, nystrom_metric
from ...layers.adopt import adopt
from ...layers.input_sketch import InputSketch
from ...layers.lora_forward import LoraForward
from ...layers.peft_lora import AdapterLayer
from ..groups import grouped
from .leaves import Leaves

DIRECTIONS = 32  # eigenvectors that are followed, at most


class Moments:
    """Metrics by layer, none at first; each look begins from the eigenvectors that the one before has found."""

    def __init__(self, layers: list[AdapterLayer]) -> None:
        self.layers = layers
        self.metrics = [_start(layer, index) for index, layer in enumerate(layers)]
        self.looking = False
        self._leaves = Leaves([])
        self._modules = [adopt(layer.module, LoraForward) for layer in layers]  # pyright: ignore[reportArgumentType]

    def open(self) -> None:
        """Begin to look."""
        for module, metric in zip(self._modules, self.metrics, strict=True):
            product, trace = metric.U.new_zeros(metric.U.shape), metric.U.new_zeros(())
            module.inputs = InputSketch(metric.U, product.requires_grad_(), trace.requires_grad_())
        sketches = [module.inputs for module in self._modules if module.inputs is not None]
        self._leaves = Leaves([leaf for sketch in sketches for leaf in (sketch.product, sketch.trace)])
        self.looking = True

    @torch.no_grad()
    def close(self) -> None:
        """What was seen since makes the metrics; a layer without a gradient keeps its own. A collective."""
        if not self.looking:
            return
        self._leaves.gather()
        totals = self._leaves.totals()
        for group in grouped(self.layers):
            products, traces = (torch.stack([totals[2 * i + part] for i in group.members]) for part in (0, 1))
            found = nystrom_metric(self.stacked(group.members), products, traces)
            for i, *parts in zip(group.members, *found, strict=True):
                self.metrics[i] = InputMetric(*(part.contiguous() for part in parts))
        self.detach()

    def detach(self) -> None:
        """Look no more."""
        for module in self._modules:
            module.inputs = None
        self._leaves, self.looking = Leaves([]), False

    def stacked(self, members: Sequence[int]) -> InputMetric:
        """The metrics of layers of one shape."""
        return InputMetric(*(torch.stack(part) for part in zip(*(self.metrics[i] for i in members), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """To be asked for between a step and the next pass, when nothing has been seen yet."""
        named = zip((layer.name for layer in self.layers), self.metrics, strict=True)
        return {"looking": self.looking, "metrics": {name: [t.clone() for t in metric] for name, metric in named}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = (state["metrics"][layer.name] for layer in self.layers)
        self.metrics = [
            InputMetric(*(t.to(now.U) for t in each)) for each, now in zip(saved, self.metrics, strict=True)
        ]
        self.detach()
        if state["looking"]:
            self.open()


def _start(layer: AdapterLayer, index: int) -> InputMetric:
    """No metric, and a random basis: the same on every process and in a resumed run."""
    generator = torch.Generator().manual_seed(7_368_787 + index)
    n = layer.Bt.shape[1]
    random = torch.randn(n, min(n, DIRECTIONS), generator=generator)
    dtype = torch.promote_types(layer.A.dtype, torch.float32)
    return no_metric(range_basis(random).to(layer.A.device, dtype).contiguous())
