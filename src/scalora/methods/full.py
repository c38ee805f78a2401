"""Full fine-tuning of the targeted modules: what every low-rank method tries to match."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.errors import ScaloraError
from ..models.heads import Head, find_heads, loading_lines
from .method import Adapted, Method
from .support.start import Start
from .support.targets import find_targets


class Full(Method):
    """The targeted modules' weights (not their biases) are trained themselves; rank, alpha and dropout mean nothing."""

    name = "full"
    summary = "full fine-tuning: the weights of the targeted modules themselves"
    lr_factor = 0.1
    has_alpha = False

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        targets = find_targets(model, self.spec, head)
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

        start = Start(weights)
        return Adapted(model, lambda path: save_model(model, head, path), start.spectra, remember=start.keep)


def save_model(model: PreTrainedModel, head: Head, path: Path) -> list[str]:
    """Save a whole model; the lines that load it with plain transformers."""
    model.save_pretrained(str(path))
    return loading_lines(head, path)


METHODS = (Full,)
