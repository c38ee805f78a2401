"""Labels for images, from a folder for each class or from rows that name them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..common.errors import ScaloraError
from .data.images import image_bytes, need_pillow, open_image
from .data.rows import PlacedRow
from .labels import Labels, LabelTask, check_label, label_scores
from .scoring import by_row, consecutive, evaluating
from .task import BaseTaskSpec, Score, Split, TokenDataset


class ImageClassificationSpec(BaseTaskSpec, frozen=True):
    """Which label belongs to the image in the column `image`: a path, or bytes as the hub has them."""

    kind: Literal["image_classification"] = "image_classification"
    image: str = "image"
    label: str = "label"
    """The column with the label; of a folder of classes it is the name of the image's own."""
    labels: list[str | bool | int] | None = None
    """All labels, in the order of the head's outputs; None takes those of train, sorted."""
    metric: Literal["accuracy", "matthews", "f1"] = "accuracy"


class ImageClassificationTask(LabelTask):
    """Cross-entropy on labels; the model's own image processor makes `pixel_values` of the images."""

    Spec = ImageClassificationSpec
    head = "image-classification"
    spec: ImageClassificationSpec

    def __init__(self, spec: ImageClassificationSpec) -> None:
        super().__init__(spec)
        need_pillow()

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.spec.image, self.spec.label)

    def read_labels(self) -> Labels:
        column = self.spec.label
        return Labels(self.spec.labels, lambda: (row[column] for row in self.rows("train")), "task.label", column)

    def check(self, row: PlacedRow) -> None:
        fixed = self.spec.labels is not None
        check_label(row, self.spec.label, refuse_missing=not fixed and self.data.missing == "refuse")
        if fixed:
            self._target(row)
        open_image(image_bytes(row[self.spec.image], self.data.folder, row.place), row.place, small=True)

    def collator(self, tokenizer: Any, model: Any = None) -> Any:
        return ImageCollator(tokenizer)

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        targets = self.read_rows(split, self._target)  # which may leave some out of the rows
        return ImageDataset(self.rows(split), self.spec.image, self.data.folder, targets)

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """The metrics of :func:`~scalora.tasks.labels.label_scores`."""
        examples, collate = self.train_dataset(tokenizer, split), self.collator(tokenizer)
        with evaluating(model, autocast) as device:

            def read(batch: list[int]) -> tuple[torch.Tensor, ...]:
                inputs = collate([examples[i] for i in batch])["pixel_values"].to(device)
                return model(pixel_values=inputs).logits.double().cpu().unbind()

            logits = by_row(consecutive(len(examples), batch_size), read, progress)
        texts = [_name(row[self.spec.image], row.place) for row in self.rows(split)]
        targets = [example["labels"] for example in examples.examples]
        metrics, predictions = label_scores(texts, self.labels, targets, torch.stack(logits), self.spec.metric)
        return Score(metrics, self.spec.metric, predictions)

    def _target(self, row: PlacedRow) -> int:
        return self.known.place(row[self.spec.label], row.place, by_number=True)


class ImageDataset(TokenDataset):
    """Images that are opened when they are looked at: dicts of `image` (PIL's) and `labels`."""

    def __init__(self, rows: Sequence[PlacedRow], column: str, folder: str, targets: Sequence[int]) -> None:
        examples = [{"row": row, "labels": target} for row, target in zip(rows, targets, strict=True)]
        super().__init__(examples, 0)
        self.column, self.folder = column, folder

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.examples[index]["row"]
        return {"image": open_image(self._bytes(row), row.place), "labels": self.examples[index]["labels"]}

    def token_bytes(self) -> Iterator[bytes]:
        return iter(())

    def content(self) -> str:
        hasher = hashlib.sha256()
        for example in self.examples:
            hasher.update(hashlib.sha256(self._bytes(example["row"])).digest())
        return f", images {hasher.hexdigest()[:16]}"

    def _bytes(self, row: PlacedRow) -> bytes:
        return image_bytes(row[self.column], self.folder, row.place)


@dataclass(frozen=True)
class ImageCollator:
    """Batches of `pixel_values` `[batch, channels, height, width]` and `labels` `[batch]`, by an image processor."""

    processor: Any

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        try:
            read = self.processor(images=[example["image"] for example in examples], return_tensors="pt")
        except (ValueError, TypeError) as error:
            raise ScaloraError(
                f"model: its image processor cannot read the images ({' '.join(str(error).split())[:200]}); choose "
                "another model"
            ) from error
        labels = torch.tensor([example["labels"] for example in examples])
        return {"pixel_values": read["pixel_values"], "labels": labels}


def _name(cell: Any, place: str) -> str:
    named = cell.get("path") if isinstance(cell, dict) else cell
    return str(named) if named else place


TASKS = (ImageClassificationTask,)
