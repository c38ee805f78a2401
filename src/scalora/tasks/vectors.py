"""Labels for vectors of numbers, from a network that reads them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch

from ..common.errors import ScaloraError
from .data.rows import PlacedRow
from .data.values import label_text, number, shown
from .scoring import by_row, consecutive, evaluating
from .task import BaseTaskSpec, Prediction, Score, Split, Task, TokenDataset


class VectorsSpec(BaseTaskSpec, frozen=True):
    """Which label belongs to the vector in the column `features`."""

    kind: Literal["vectors"] = "vectors"
    features: str = "features"
    label: str = "label"
    """The column with the label: the index of one of the network's outputs."""
    metric: Literal["accuracy", "nll"] = "accuracy"


class VectorsTask(Task):
    """Cross-entropy on labels; the model takes `inputs_embeds` `[batch, features]`."""

    Spec = VectorsSpec
    head = "sequence-classification"
    tokens = False

    spec: VectorsSpec

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.spec.features, self.spec.label)

    @property
    def num_labels(self) -> int:
        return self._classes

    @cached_property
    def _classes(self) -> int:
        return len({label_text(row[self.spec.label]) for row in self.rows("train")})

    def collator(self, tokenizer: Any, model: Any = None) -> Any:
        return _collate

    def equip(self, model: Any) -> None:
        """See that the network reads vectors of this width, and has an output for each label."""
        if not (widths := getattr(model.config, "widths", None)):
            return
        if self.num_labels > widths[-1]:
            raise ScaloraError(
                f"task.label: the training rows have {self.num_labels} labels, but the network has {widths[-1]} "
                "outputs: choose another model"
            )
        for row in (row for rows in self.splits for row in rows or ()):
            if (count := len(row[self.spec.features])) != widths[0]:
                raise ScaloraError(
                    f"task.features: the column {self.spec.features!r} has {count} numbers in {row.place}, but the "
                    f"network reads {widths[0]}: mend or drop the row, or choose another model"
                )

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        return TokenDataset([self._example(row) for row in self.rows(split)], 0)

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """`accuracy`, and `nll`: mean nats per row."""
        examples = [self._example(row) for row in self.rows(split)]
        with evaluating(model, autocast) as device:

            def read(batch: list[int]) -> tuple[torch.Tensor, ...]:
                inputs = _collate([examples[i] for i in batch])["inputs_embeds"].to(device)
                return model(inputs_embeds=inputs).logits.float().cpu().unbind()

            logits = by_row(consecutive(len(examples), batch_size), read, progress)
        logprobs = torch.stack(logits).double().log_softmax(-1)
        expected = torch.tensor([example["labels"] for example in examples])
        best = logprobs.argmax(-1)
        metrics = {
            "accuracy": (best == expected).double().mean().item(),
            "nll": -logprobs.gather(-1, expected[:, None]).mean().item(),
        }
        predictions = [
            Prediction(f"row {number}", str(wanted), str(found), row[found].exp().item())
            for number, (wanted, found, row) in enumerate(
                zip(expected.tolist(), best.tolist(), logprobs, strict=True), 1
            )
        ]
        return Score(metrics, self.spec.metric, predictions)

    def check(self, row: PlacedRow) -> None:
        features, label = row[self.spec.features], number(row[self.spec.label])
        if not isinstance(features, list) or not features or not all(map(_is_number, features)):
            raise ScaloraError(
                f"task.features: the column {self.spec.features!r} must hold lists of numbers, found {shown(features)} "
                f"in {row.place}"
            )
        if label is None or not label.is_integer() or label < 0:
            raise self._no_index(row)

    def _example(self, row: PlacedRow) -> dict[str, Any]:
        label = number(row[self.spec.label])
        if label is None or label >= self.num_labels:
            raise self._no_index(row, f": the training rows have {self.num_labels} different ones")
        return {"inputs_embeds": row[self.spec.features], "labels": int(label)}

    def _no_index(self, row: PlacedRow, reason: str = "") -> ScaloraError:
        return ScaloraError(
            f"task.label: {shown(row[self.spec.label])} in column {self.spec.label!r} is no index of a label, counted "
            f"from 0, in {row.place}{reason}"
        )


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and number(value) is not None


def _collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    widths = {len(example["inputs_embeds"]) for example in examples}
    if len(widths) > 1:
        raise ScaloraError(
            f"task.features: vectors of {' and '.join(map(str, sorted(widths)))} numbers in one data set"
        )
    return {
        "inputs_embeds": torch.tensor([example["inputs_embeds"] for example in examples], dtype=torch.float32),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


TASKS = (VectorsTask,)
