"""Bytes that training holds beside the frozen base: where "a LoRA of equal memory" is looked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from ..engine.optimizers import innermost
from ..engine.trainer import ScaLoraCallback
from ..methods import Adapted
from ..methods.support.full_rank import FullRankOptimizer


class HeldBytes(TrainerCallback):
    """Counts, in the last step, what is trained, its gradients, the optimizer's state, and what store and refresh keep.

    Args:
        adapted: what is trained.
        base: bytes of the base model's parameters, as it was before it was adapted.
    """

    def __init__(self, adapted: Adapted, base: int) -> None:
        self.adapted, self.base = adapted, base
        self.found: int | None = None  # until the last step, and where a resumed run had no step left

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step < state.max_steps and not control.should_training_stop:
            return
        optimizer = innermost(kwargs["optimizer"])
        if isinstance(optimizer, FullRankOptimizer):
            gradients = optimizer.gradient_bytes()
        else:
            gradients = sum(p.nbytes for p in self.adapted.model.parameters() if p.requires_grad)
        # Weights that a method trains themselves are held once, as the base's.
        beside = max(0, weight_bytes(self.adapted.model) - self.base)
        handles = [c.handle for c in self.adapted.callbacks if isinstance(c, ScaLoraCallback) and c.handle]
        own: list[Any] = [getattr(callback, "optimizer", None) for callback in self.adapted.callbacks]
        # Of what a callback trains itself.
        others = [each for each in own if isinstance(each, Optimizer) and each is not optimizer]
        gradients += sum(p.nbytes for each in others for group in each.param_groups for p in group["params"])
        kept = [[dict(each.state) for each in (optimizer, *others)], [handle.state_dict() for handle in handles]]
        self.found = beside + gradients + sum(tensor.nbytes for tensor in _tensors(kept))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.nbytes for p in model.parameters())


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value)
