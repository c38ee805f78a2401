"""Labels by their names: which there are, the place of each among a head's outputs, and how often they are right."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from ..common.errors import ScaloraError
from .data.rows import PlacedRow
from .data.values import flaw, is_missing, label_key, label_text, lookalike, number, shown
from .task import Prediction, Task

_FEW = 20  # labels that any data may have, however few its rows


class Labels:
    """All labels of a task, in the order of the head's outputs: those that are given, else those found, sorted.

    Args:
        given: the recipe's `task.labels`.
        find: gives the labels of the training rows, where none are given; numbers are sorted as numbers.
        field: the recipe's name of their column, for messages.
        column: its own name.
        instead: what to do where they are no labels but numbers, as the end of a message.

    Raises:
        ScaloraError: there are fewer than two, two that are the same or look alike, or so many that they are texts.
    """

    def __init__(
        self,
        given: Sequence[Any] | None,
        find: Callable[[], Iterable[Any]],
        field: str,
        column: str,
        instead: str = "",
    ) -> None:
        self.given, self.field = given is not None, field
        if given is None:
            self.names = _sorted(list(find()), field, column, instead)
        else:
            self.names = [label_text(label) for label in given]
        self._places = {label_key(name): place for place, name in enumerate(self.names)}
        if len(self._places) < max(2, len(self.names)):
            raise ScaloraError(f"task.labels: a task needs two or more different labels, found {self.names}")

    def find(self, value: Any) -> int | None:
        """The place of a value among the labels; None if it is none of them."""
        return self._places.get(label_key(value))

    def place(self, value: Any, where: str, *, by_number: bool = False) -> int:
        """The place of a value among the labels; `by_number`, it may be its number in a list that was given.

        Where a name is a number itself, a number is a name: 0 is none of 1, 2 and 3, and not the first of them.

        Raises:
            ScaloraError: it is none of them; the message says where the value is.
        """
        place = self.find(value)
        numbered = by_number and self.given and all(number(name) is None for name in self.names)
        if place is None and numbered and label_text(value).isdecimal():
            place = int(label_text(value)) if int(label_text(value)) < len(self.names) else None
        if place is None:
            origin = "of the training rows, from which the classes are taken"
            raise ScaloraError(
                f"{self.field}: {shown(value)} in {where} is not one of the labels {shown(self.names, 300)} "
                f"{'that task.labels lists' if self.given else origin}{lookalike(value, self.names)}; mend or drop "
                f"the row, or {'list it too' if self.given else 'list all labels in task.labels'}"
            )
        return place


class LabelTask(Task):
    """A task whose head has an output for each of its labels."""

    @abstractmethod
    def read_labels(self) -> Labels:
        """The labels, given or found; raises ScaloraError as :class:`Labels` does."""

    @cached_property
    def known(self) -> Labels:
        """The labels, read at the first look."""
        return self.read_labels()

    @property
    def labels(self) -> list[str]:
        """The labels as texts, in the order of the head's outputs; numbers are sorted as numbers."""
        return self.known.names

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def class_names(self) -> list[str]:
        return self.labels


def _sorted(found: Sequence[Any], field: str, column: str, instead: str) -> list[str]:
    # Of True and true, which are the same, one is shown.
    texts = sorted({label_text(label) for label in found}, reverse=True)
    labels = sorted({label_key(label): label for label in texts}.values())
    if len(labels) > max(_FEW, len(found) / 2) and not all(number(label) is not None for label in labels):
        raise ScaloraError(
            f"{field}: column {column!r} has {len(labels)} different values in {len(found)} training rows: is it the "
            "label? Name another column, or list all labels in task.labels"
        )
    for i, label in enumerate(labels):
        if near := lookalike(label, labels[:i]):
            raise ScaloraError(
                f"{field}: {label!r} would be a class of its own in the training rows{near}; mend the rows, or list "
                "all labels in task.labels"
            )
    if all(number(label) is not None for label in labels):
        labels.sort(key=float)
        if fraction := next((label for label in labels if not float(label).is_integer()), None):
            instead = instead or "; list all in task.labels if they are"
            raise ScaloraError(f"{field}: {fraction!r} and others are numbers, not labels{instead}")
    return labels


def check_label(row: PlacedRow, column: str, *, refuse_missing: bool) -> None:
    """Raise ScaloraError, with the row's place, where the column holds no label."""
    value = row[column]
    if reason := flaw(value):
        raise ScaloraError(f"task.label: column {column!r} {reason} in {row.place}; mend or drop the row")
    if refuse_missing and is_missing(value):
        raise ScaloraError(
            f"task.label: the label is {shown(value)} in {row.place}; fill or drop the row, or name all labels in "
            "task.labels if it is one"
        )


def label_scores(
    texts: Sequence[str], names: list[str], targets: Sequence[int], logits: torch.Tensor, metric: str
) -> tuple[dict[str, float], list[Prediction]]:
    """`accuracy` and `nll` (mean nats per row), with f1 or matthews where `metric` is that; and a prediction each.

    `f1` is that of the second label where there are two, else the mean over labels (macro).

    Args:
        texts: what the model was given, a text for each row.
        names: of the labels.
        targets: the places of the rows' labels.
        logits: float64 `[rows, labels]`.
        metric: accuracy, f1 or matthews.

    Raises:
        ScaloraError: scikit-learn is needed and missing.
    """
    expected = torch.tensor(targets)
    logprobs = logits.log_softmax(-1)
    best = logprobs.argmax(-1)
    metrics = {
        "accuracy": (best == expected).double().mean().item(),
        "nll": -logprobs.gather(-1, expected[:, None]).mean().item(),
    }
    if metric != "accuracy":
        scores = needed("sklearn.metrics", metric)
        if metric == "matthews":
            metrics["matthews"] = float(scores.matthews_corrcoef(targets, best.numpy()))
        else:
            average = "binary" if len(names) == 2 else "macro"
            metrics["f1"] = float(scores.f1_score(targets, best.numpy(), average=average, zero_division=0))
    predictions = [
        Prediction(text, names[target], names[found], row[found].exp().item())
        for text, target, found, row in zip(texts, targets, best.tolist(), logprobs, strict=True)
    ]
    return metrics, predictions


def needed(module: str, metric: str) -> Any:
    """A module that a metric needs; raises ScaloraError where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ScaloraError(f"task.metric {metric!r} needs {module}: pip install 'scalora[arena]'") from error
