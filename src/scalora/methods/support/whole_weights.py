"""The targeted modules' weights, trained themselves and saved as a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

from ...common.errors import ScaloraError
from ...models.heads import Head, find_heads, loading_lines
from ..method import Adapted, MethodSpec
from .start import Start
from .targets import find_targets

WholeOptimizer = Callable[[nn.Module, Mapping[str, Tensor], TrainingArguments], Optimizer]
"""Makes an optimizer of all that a model trains, of the targeted weights by module name, and of Trainer's arguments."""


def train_whole(
    model: PreTrainedModel, spec: MethodSpec, head: Head, optimizer: WholeOptimizer | None = None
) -> Adapted:
    """Train the targeted weights (not their biases) and the head, in place; without ``optimizer`` by the recipe's.

    Raises:
        ScaloraError: nothing is targeted, a weight is not float32, or the rank of an optimizer is too large for it.
    """
    targets = find_targets(model, spec, head)
    for name, module in targets:
        if module.weight.dtype != torch.float32:
            dtype = str(module.weight.dtype).removeprefix("torch.")
            raise ScaloraError(
                f"dtype: weight {name} is {dtype}, in which the small steps of full fine-tuning are lost: load the "
                "model in float32 (training.bf16 may still be true)"
            )
    model.requires_grad_(False)
    for _, module in (*targets, *find_heads(model, head)):
        module.requires_grad_(True)
    for _, module in targets:
        if module.bias is not None:
            module.bias.requires_grad_(False)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, module in targets:
            yield name, module.weight.T if isinstance(module, Conv1D) else module.weight

    def make(arguments: TrainingArguments) -> Optimizer:
        assert optimizer is not None
        return optimizer(model, {name: module.weight for name, module in targets}, arguments)

    start = Start(weights)
    return Adapted(
        model,
        lambda path: save_whole(model, head, path),
        start.spectra,
        remember=start.keep,
        optimizer=make if optimizer else None,
    )


def require_rank(model: PreTrainedModel, spec: MethodSpec, head: Head) -> None:
    """Raises ScaloraError where the rank exceeds a targeted weight's dimensions."""
    for name, module in find_targets(model, spec, head):
        if spec.rank > min(module.weight.shape):
            m, n = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
            raise ScaloraError(f"method.rank is {spec.rank}, but layer {name} is {m}x{n}: choose {min(m, n)} or less")


def save_whole(model: PreTrainedModel, head: Head, path: Path) -> list[str]:
    """Save a whole model; the lines that load it with plain transformers."""
    model.save_pretrained(str(path))
    return loading_lines(head, path)
