"""Labels or numbers for texts, from a classification head."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from ..common.errors import ScaloraError
from .data.rows import PlacedRow
from .data.values import number, shown
from .labels import Labels, LabelTask, check_label, label_scores, needed
from .scoring import batches, by_row, evaluating
from .task import BaseTaskSpec, Prediction, Score, Split, TokenDataset
from .template import Template

Metric = Literal["accuracy", "matthews", "f1", "pearson_spearman"]


class ClassificationSpec(BaseTaskSpec, frozen=True):
    """Which label, or which number, belongs to `text` (and `text_pair`): each a column's name or a template."""

    kind: Literal["classification"] = "classification"
    text: str
    text_pair: str | None = None
    label: str = "label"
    """The column with the label."""
    labels: list[str | bool | int] | None = None
    """All labels, in the order of the head's outputs; None takes those of train, sorted."""
    regression: bool = False
    metric: Metric | None = None
    """What counts; None is accuracy, and pearson_spearman (their mean) for regression."""
    max_length: int = Field(default=512, ge=2)


class ClassificationTask(LabelTask):
    """Cross-entropy on labels; squared error on numbers with `regression`."""

    Spec = ClassificationSpec
    head = "sequence-classification"
    spec: ClassificationSpec

    def __init__(self, spec: ClassificationSpec) -> None:
        self.metric: Metric = spec.metric or ("pearson_spearman" if spec.regression else "accuracy")
        if (self.metric == "pearson_spearman") != spec.regression:
            wanted = "pearson_spearman" if spec.regression else "accuracy, matthews or f1"
            raise ScaloraError(f"task.metric is {self.metric!r} with regression {spec.regression}: it must be {wanted}")
        if spec.regression and spec.labels is not None:
            raise ScaloraError(f"task.labels is {spec.labels}, but regression has no labels; leave it out")
        super().__init__(spec)
        self.text = column_or_template("task.text", spec.text)
        self.text_pair = None if spec.text_pair is None else column_or_template("task.text_pair", spec.text_pair)

    @property
    def columns(self) -> tuple[str, ...]:
        pair = () if self.text_pair is None else self.text_pair.columns
        return tuple(dict.fromkeys((*self.text.columns, *pair, self.spec.label)))

    @property
    def num_labels(self) -> int:
        return 1 if self.spec.regression else super().num_labels

    @property
    def class_names(self) -> list[str]:
        return [] if self.spec.regression else super().class_names

    def read_labels(self) -> Labels:
        return Labels(
            self.spec.labels,
            lambda: (row[self.spec.label] for row in self.rows("train")),
            "task.label",
            self.spec.label,
            "; set regression: true",
        )

    def check(self, row: PlacedRow) -> None:
        for template in (self.text, self.text_pair):
            if template is not None:
                template.check(row, keep_missing=self.data.missing == "keep")
        fixed = self.spec.regression or self.spec.labels is not None
        check_label(row, self.spec.label, refuse_missing=not fixed and self.data.missing == "refuse")
        if fixed:
            self._target(row)

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        encoded, targets, truncated = self._encode(tokenizer, split)
        return TokenDataset([{**e, "labels": t} for e, t in zip(encoded, targets, strict=True)], truncated)

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """The metrics of :func:`~scalora.tasks.labels.label_scores`; for regression pearson, spearman and mse."""
        encoded, targets, truncated = self._encode(tokenizer, split)
        collate = self.collator(tokenizer)
        with evaluating(model, autocast) as device:
            lengths = [len(each["input_ids"]) for each in encoded]

            def read(batch: list[int]) -> tuple[torch.Tensor, ...]:
                inputs = collate([encoded[i] for i in batch])
                return model(**{k: v.to(device) for k, v in inputs.items()}).logits.float().cpu().unbind()

            logits = torch.stack(by_row(list(batches(lengths, [1] * len(lengths), batch_size)), read, progress))
        texts = self._texts(split)
        if self.spec.regression:
            return self._score_numbers(texts, targets, logits.double(), truncated)
        metrics, predictions = label_scores(texts, self.labels, targets, logits.double(), self.metric)
        return Score(metrics, self.metric, predictions, truncated)

    def _score_numbers(self, texts: list[str], targets: list[float], logits: torch.Tensor, truncated: int) -> Score:
        stats = needed("scipy.stats", self.metric)
        found = logits[:, 0].numpy()
        pearson, spearman = float(stats.pearsonr(targets, found)[0]), float(stats.spearmanr(targets, found)[0])
        metrics = {
            "pearson_spearman": (pearson + spearman) / 2,
            "pearson": pearson,
            "spearman": spearman,
            "mse": float(((found - targets) ** 2).mean()),
        }
        predictions = [
            Prediction(text, f"{target:g}", f"{each:.4g}", None)
            for text, target, each in zip(texts, targets, found, strict=True)
        ]
        return Score(metrics, self.metric, predictions, truncated)

    def _texts(self, split: Split) -> list[str]:
        templates = [self.text] if self.text_pair is None else [self.text, self.text_pair]
        return [" | ".join(template(row) for template in templates) for row in self.rows(split)]

    def _encode(self, tokenizer: Any, split: Split) -> tuple[list[dict[str, list[int]]], list[Any], int]:
        """Of each row its tokens and its target; and how many rows are cut."""
        if not self.spec.regression:
            _ = self.known
        read = self.read_together(split, lambda rows: self._read(tokenizer, rows))
        return [tokens for tokens, _, _ in read], [target for _, target, _ in read], sum(cut for _, _, cut in read)

    def _read(self, tokenizer: Any, rows: list[PlacedRow]) -> list[tuple[dict[str, list[int]], Any, bool]]:
        texts = [self.text(row) for row in rows]
        pairs = None if self.text_pair is None else [self.text_pair(row) for row in rows]
        full = tokenizer(texts, pairs)["input_ids"]
        cut = tokenizer(texts, pairs, truncation=True, max_length=self.spec.max_length)
        keys = [key for key in ("input_ids", "token_type_ids") if key in cut]
        for row, ids in zip(rows, cut["input_ids"], strict=True):
            if not ids:
                raise ScaloraError(f"task.text: the text has no tokens in {row.place}; mend or drop the row")
        encoded = [dict(zip(keys, values, strict=True)) for values in zip(*(cut[key] for key in keys), strict=True)]
        targets, long = map(self._target, rows), [len(ids) > self.spec.max_length for ids in full]
        return list(zip(encoded, targets, long, strict=True))

    def _target(self, row: PlacedRow) -> float | int:
        """What the head is to say of a row: a number, or the label's place."""
        value = row[self.spec.label]
        if not self.spec.regression:
            return self.known.place(value, row.place)
        if (found := number(value)) is None:
            raise ScaloraError(
                f"task.label: {shown(value)} in {row.place} is not a finite number; mend or drop the row"
            )
        return found


def column_or_template(field: str, text: str) -> Template:
    """A text with a brace is a template, any other the name of a column."""
    return Template(field, text, is_column="{" not in text)


TASKS = (ClassificationTask,)
