"""A plain dense network as a transformers model, and one that knows the handwritten digits: seconds per run.

It reads vectors, given as `inputs_embeds`, and is loaded by `AutoModelForSequenceClassification` once this file is
imported. The digits are scikit-learn's (1,797 images of 8×8 pixels). "digits" are upright; "digits-turned" are the same
images a quarter turn round, and every digit is called by another's name: a mapping that shares nothing with the old one
but the strokes, so that fine-tuning has to rebuild every layer, and rank matters.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..common.errors import ScaloraError
from .heads import auto_class
from .made import made_once

_VERSION = 1  # of what `digits_mlp` does: a cached network of another version is not used
_WIDTHS = (64, 128, 128, 10)
_NAMES = (4, 7, 1, 9, 0, 2, 8, 5, 3, 6)  # what each turned digit is called


class DenseConfig(PreTrainedConfig):
    """Widths of a dense network, inputs first, classes last."""

    model_type = "scalora-dense"

    def __init__(self, widths: tuple[int, ...] = _WIDTHS, **options: Any) -> None:
        self.widths = list(widths)
        super().__init__(**{"num_labels": self.widths[-1], **options})


class DenseClassifier(PreTrainedModel):
    """Linear layers with ReLU between; `layers.0` is the first."""

    config_class = DenseConfig
    config: DenseConfig

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(config.widths))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(
        self, inputs_embeds: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits `[batch, classes]` for vectors `[batch, features]`; the mean cross-entropy where there are labels."""
        assert inputs_embeds is not None
        x = self.layers[0](inputs_embeds)
        for layer in self.layers[1:]:
            x = layer(x.relu())
        loss = None if labels is None else nn.functional.cross_entropy(x.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=x)  # pyright: ignore[reportArgumentType]


AutoConfig.register(DenseConfig.model_type, DenseConfig)
auto_class("sequence-classification").register(DenseConfig, DenseClassifier)


def digit_rows(name: str) -> list[dict[str, Any]]:
    """The rows of "digits" or "digits-turned": `pixels`, 64 numbers from 0 to 1, and `label`.

    Raises:
        ScaloraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ScaloraError(f"{name} needs scikit-learn: pip install 'scalora[arena]'") from error
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16
    if name == "digits-turned":
        images, labels = images.rot90(dims=(1, 2)), [_NAMES[label] for label in labels]
    return [
        {"pixels": image, "label": int(label)} for image, label in zip(images.flatten(1).tolist(), labels, strict=True)
    ]


def digits_mlp() -> Path:
    """The folder, in the cache, of a network of 26,122 parameters that knows upright digits; trained at the first call.

    It has seen them all: what is fine-tuned is another task, with test images of its own.

    Raises:
        ScaloraError: scikit-learn is not installed, or the cache cannot be written to.
    """
    rows = digit_rows("digits")
    name = "-".join(("digits-mlp", *map(str, _WIDTHS), f"v{_VERSION}"))
    return made_once(name, lambda folder: _trained(rows).save_pretrained(folder))


def _trained(rows: list[dict[str, Any]]) -> DenseClassifier:
    x, y = torch.tensor([row["pixels"] for row in rows]), torch.tensor([row["label"] for row in rows])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DenseClassifier(DenseConfig())
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(500):
            batch = torch.randint(len(x), (64,))
            loss = model(x[batch], y[batch]).loss
            assert loss is not None
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model
