"""Labels or numbers for texts, from a classification head."""

from __future__ import annotations

import math
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

import torch
from pydantic import Field

from ..common.errors import ScaloraError
from .task import BaseTaskSpec, Prediction, Score, Split, Task, Template, TokenDataset, batches, evaluating

Metric = Literal["accuracy", "matthews", "f1", "pearson_spearman"]


class ClassificationSpec(BaseTaskSpec, frozen=True):
    """Which label, or which number, belongs to `text` (and `text_pair`): each a column's name or a template."""

    kind: Literal["classification"] = "classification"
    text: str
    text_pair: str | None = None
    label: str = "label"
    """The column with the label."""
    labels: list[str | int] | None = None
    """All labels, in the order of the head's outputs; None takes those of train, sorted."""
    regression: bool = False
    metric: Metric | None = None
    """What counts; None is accuracy, and pearson_spearman (their mean) for regression."""
    max_length: int = Field(default=512, ge=2)


class ClassificationTask(Task):
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
        self.text = _template("task.text", spec.text)
        self.text_pair = None if spec.text_pair is None else _template("task.text_pair", spec.text_pair)

    @property
    def columns(self) -> tuple[str, ...]:
        pair = () if self.text_pair is None else self.text_pair.columns
        return tuple(dict.fromkeys((*self.text.columns, *pair, self.spec.label)))

    @property
    def num_labels(self) -> int:
        return 1 if self.spec.regression else len(self.labels)

    @cached_property
    def labels(self) -> list[str]:
        """The labels as texts, in the order of the head's outputs; numbers are sorted as numbers."""
        if self.spec.labels is not None:
            labels = [str(label) for label in self.spec.labels]
        else:
            labels = sorted({str(row[self.spec.label]) for row in self.rows("train")})
            if all(_number(label) is not None for label in labels):
                labels.sort(key=float)
                if not all(float(label).is_integer() for label in labels):
                    raise ScaloraError(
                        f"task.label: {labels[0]!r} and others are numbers, not labels; set regression: true"
                    )
        if len(set(labels)) < max(2, len(labels)):
            raise ScaloraError(f"task.labels: classification needs two or more different labels, found {labels}")
        return labels

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        encoded, truncated = self._encode(tokenizer, split)
        targets = self._targets(split)
        return TokenDataset([{**e, "labels": t} for e, t in zip(encoded, targets, strict=True)], truncated)

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """The task's metric, with accuracy and nll (mean nats per row); for regression pearson, spearman and mse.

        `f1` is that of the second label where there are two, else the mean over labels (macro).
        """
        encoded, truncated = self._encode(tokenizer, split)
        targets = self._targets(split)
        collate = self.collator(tokenizer)
        logits = torch.empty(len(encoded), self.num_labels)
        done = 0
        with evaluating(model, autocast) as device:
            lengths = [len(each["input_ids"]) for each in encoded]
            for batch in batches(lengths, [1] * len(lengths), batch_size):
                inputs = collate([encoded[i] for i in batch])
                logits[batch] = model(**{k: v.to(device) for k, v in inputs.items()}).logits.float().cpu()
                done += len(batch)
                if progress:
                    progress(done, len(encoded))
        score = self._score_numbers if self.spec.regression else self._score_labels
        return score(self._texts(split), targets, logits.double(), truncated)

    def _score_labels(self, texts: list[str], targets: list[int], logits: torch.Tensor, truncated: int) -> Score:
        expected = torch.tensor(targets)
        logprobs = logits.log_softmax(-1)
        best = logprobs.argmax(-1)
        metrics = {
            "accuracy": (best == expected).double().mean().item(),
            "nll": -logprobs.gather(-1, expected[:, None]).mean().item(),
        }
        if self.metric != "accuracy":
            scores = _import("sklearn.metrics", self.metric)
            if self.metric == "matthews":
                metrics["matthews"] = float(scores.matthews_corrcoef(targets, best.numpy()))
            else:
                average = "binary" if len(self.labels) == 2 else "macro"
                metrics["f1"] = float(scores.f1_score(targets, best.numpy(), average=average, zero_division=0))
        predictions = [
            Prediction(text, self.labels[target], self.labels[found], row[found].exp().item())
            for text, target, found, row in zip(texts, targets, best.tolist(), logprobs, strict=True)
        ]
        return Score(metrics, self.metric, predictions, truncated)

    def _score_numbers(self, texts: list[str], targets: list[float], logits: torch.Tensor, truncated: int) -> Score:
        stats = _import("scipy.stats", self.metric)
        found = logits[:, 0].numpy()
        pearson, spearman = float(stats.pearsonr(targets, found)[0]), float(stats.spearmanr(targets, found)[0])
        metrics = {
            "pearson_spearman": (pearson + spearman) / 2,
            "pearson": pearson,
            "spearman": spearman,
            "mse": float(((found - targets) ** 2).mean()),
        }
        predictions = [
            Prediction(text, f"{target:g}", f"{number:.4g}", None)
            for text, target, number in zip(texts, targets, found, strict=True)
        ]
        return Score(metrics, self.metric, predictions, truncated)

    def _texts(self, split: Split) -> list[str]:
        templates = [self.text] if self.text_pair is None else [self.text, self.text_pair]
        return [" | ".join(template(row) for template in templates) for row in self.rows(split)]

    def _encode(self, tokenizer: Any, split: Split) -> tuple[list[dict[str, list[int]]], int]:
        rows = self.rows(split)
        texts = [self.text(row) for row in rows]
        pairs = None if self.text_pair is None else [self.text_pair(row) for row in rows]
        full = tokenizer(texts, pairs)["input_ids"]
        cut = tokenizer(texts, pairs, truncation=True, max_length=self.spec.max_length)
        keys = [key for key in ("input_ids", "token_type_ids") if key in cut]
        for number, ids in enumerate(cut["input_ids"], 1):
            if not ids:
                raise ScaloraError(f"task.text: row {number} of {split} has no tokens; drop empty rows")
        encoded = [dict(zip(keys, values, strict=True)) for values in zip(*(cut[key] for key in keys), strict=True)]
        return encoded, sum(len(ids) > self.spec.max_length for ids in full)

    def _targets(self, split: Split) -> list[Any]:
        values = [row[self.spec.label] for row in self.rows(split)]
        if self.spec.regression:
            targets = [_number(value) for value in values]
            known = "a finite number"
        else:
            index = {label: i for i, label in enumerate(self.labels)}
            targets = [index.get(str(value)) for value in values]
            known = f"one of the labels {self.labels}"
        if None in targets:
            raise ScaloraError(f"task.label: {values[targets.index(None)]!r} in the {split} data is not {known}")
        return targets


def _template(field: str, text: str) -> Template:
    return Template(field, text if "{" in text else f"{{{text}}}")


def _import(module: str, metric: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ScaloraError(f"task.metric {metric!r} needs {module}: pip install 'scalora[arena]'") from error


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


TASKS = (ClassificationTask,)
