"""What every task can do: give training examples, and score a model on held-out rows."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, model_validator

from ..common.errors import ScaloraError
from ..common.numeric import numbers_only
from ..models.heads import Head
from .data.rows import DataSpec, PlacedRow, Splits, load_splits
from .data.source import BadRow
from .data.tally import Tally
from .data.values import flaw
from .examples import Collator, TokenDataset
from .scoring import Progress

Split = Literal["train", "validation", "test"]
T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """One held-out row: what the model was given, what was right, and what it said.

    `predicted` is None where a task only measures likelihood. `probability` is what the model gave to `predicted`
    (there: to `expected`, per token); None for regression.
    """

    text: str
    expected: str
    predicted: str | None
    probability: float | None


@dataclass(frozen=True)
class Score:
    """A model's metrics on one split, in nats where they are likelihoods, and its predictions in the rows' order.

    Raises:
        ScaloraError: a metric is not finite.
    """

    metrics: dict[str, float]
    primary: str
    predictions: list[Prediction]
    truncated: int = 0
    """Sequences that were cut to max_length."""

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise ScaloraError(
                    f"metric {name} is {value}: the model's outputs are not finite or do not vary; "
                    "lower the learning rate, or use dtype bfloat16 or float32"
                )

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger primary metric is the better one."""
        return self.primary != "nll"


class BaseTaskSpec(BaseModel, frozen=True, extra="forbid"):
    """The `task` section of a recipe, as far as all kinds share it."""

    kind: str
    data: DataSpec
    _numbers = model_validator(mode="before")(numbers_only)


class Task(ABC):
    """Data and metric of one problem; a file in this package lists its tasks in ``TASKS`` and is found by that.

    Nothing is loaded before `splits` is first looked at.
    """

    Spec: ClassVar[type[BaseTaskSpec]]
    """Its section of a recipe, whose `kind` is a literal with a default."""
    head: ClassVar[Head]
    tokens: ClassVar[bool] = True
    """Whether what the model reads is made by its own tokenizer (or image processor), and so needs one."""
    compares: ClassVar[bool] = False
    """Whether it compares with the untouched base model, and so needs `refer`."""
    data: DataSpec

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.data = spec.data
        self.tally = Tally()
        self.notes: list[str] = []
        """What was done to the rows that was not asked for by name, a line each; complete once examples are made."""

    @classmethod
    def kind(cls) -> str:
        """What a recipe calls it."""
        return cls.Spec.model_fields["kind"].default

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns, under our names, that every row must have."""

    @property
    def optional(self) -> dict[str, bool]:
        """Columns that rows may lack, or have empty; and whether the recipe asks for it, so that some row has it."""
        return {}

    @property
    def num_labels(self) -> int | None:
        """Outputs of a classification head; None for a causal language model."""
        return None

    @property
    def class_names(self) -> list[str] | None:
        """Names of a classification head's outputs, none for regression; None where the task has no names for them."""
        return None

    @property
    def max_written(self) -> int | None:
        """The most tokens that scoring makes the model write by itself; None where it does not."""
        return None

    @cached_property
    def splits(self) -> Splits:
        """The rows, loaded at the first look; raises ScaloraError where a source or a column is missing."""
        return load_splits(self.data, self.columns, self.check, self.notes.append, self.optional, self.tally)

    def check(self, row: PlacedRow) -> None:
        """Raise ScaloraError, with the row's place, where it holds what cannot be trained on or scored."""
        for name in self.columns:
            if reason := flaw(row[name]):
                raise ScaloraError(f"task: column {name!r} {reason} in {row.place}; mend or drop the row")

    def rows(self, split: Split) -> list[PlacedRow]:
        """The rows of one split; raises ScaloraError for a validation split that there is not."""
        rows = getattr(self.splits, split)
        if rows is None:
            raise ScaloraError(
                "task.data.validation: there is no validation data; name a source or set validation_size"
            )
        return rows

    def read_rows(self, split: Split, read: Callable[[PlacedRow], T]) -> list[T]:
        """What `read` makes of a split's rows; those for which it raises ScaloraError are malformed.

        They are none of its rows from now on, which is said once.

        Raises:
            ScaloraError: all rows are malformed, or of their source more than `max_bad_rows`.
        """
        found: list[tuple[PlacedRow, T]] = []
        bad: list[BadRow] = []
        for row in (rows := self.rows(split)):
            try:
                found.append((row, read(row)))
            except ScaloraError as error:
                if not self.data.max_bad_rows:
                    raise
                bad.append(BadRow(row.line, error))
        if bad:
            source = "train" if getattr(self.data, split) is None else split
            self.tell(self.tally.leave_out(split, source, bad, len(rows), self.data.max_bad_rows))
            self.splits = self.splits._replace(**{split: [row for row, _ in found]})
        return [each for _, each in found]

    def read_together(self, split: Split, read: Callable[[list[PlacedRow]], list[T]]) -> list[T]:
        """What `read` makes of all rows of a split at once; where one is malformed, of each, as :meth:`read_rows`."""
        try:
            return read(self.rows(split))
        except ScaloraError:
            if not self.data.max_bad_rows:
                raise
        return self.read_rows(split, lambda row: read([row])[0])

    def fitting(
        self, split: Split, needed: Sequence[int], max_length: int, field: str = "task.max_length"
    ) -> list[int]:
        """The numbers of a split's rows that fit; the others are none of its rows from now on, which is said once.

        Args:
            split: whose rows are meant.
            needed: the tokens that each row must have.
            max_length: the tokens that it may have.
            field: the recipe's name of that number.

        Raises:
            ScaloraError: no row fits, or more than `max_long_rows` do not.
        """
        rows, allowed = self.rows(split), self.data.max_long_rows
        fits = [number for number, tokens in enumerate(needed) if tokens <= max_length]
        if not (long := len(rows) - len(fits)):
            return fits
        first = min((n for n, tokens in enumerate(needed) if tokens > max_length), key=lambda n: rows[n].line)
        what = f"{long} of {len(rows)} {split} rows need more tokens than {field}, {max_length}"
        example = f"the first, {rows[first].place}, needs {needed[first]}"
        if not fits or (allowed is not None and long > allowed):
            limit = "" if allowed is None else f"task.data.max_long_rows is {allowed}, but "
            raise ScaloraError(f"{limit}{what} ({example}): raise {field}, or shorten the rows")
        self.tell(f"{what}, and are left out: {example}")
        self.splits = self.splits._replace(**{split: [rows[number] for number in fits]})
        return fits

    def tell(self, line: str) -> None:
        """Add to the notes what they do not say yet."""
        if line not in self.notes:
            self.notes.append(line)

    def collator(self, tokenizer: Any, model: Any = None) -> Collator:
        """What makes a padded batch of the examples of `train_dataset`; lean where `model` knows `logits_to_keep`."""
        lean = model is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
        return Collator(tokenizer.pad_token_id, lean)

    def refer(
        self,
        model: Any,
        tokenizer: Any,
        datasets: Mapping[Split, TokenDataset],
        batch_size: int,
        autocast: torch.dtype | None,
    ) -> None:
        """Measure the untouched base model on the examples of these splits, where the task compares with it."""

    def equip(self, model: Any) -> None:
        """Let the model compute the task's own loss on the task's batches, in place; most tasks take the model's."""

    @abstractmethod
    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        """The rows of a split as examples to train on; labels are -100 where there is no loss."""

    @abstractmethod
    def score(
        self,
        model: Any,
        tokenizer: Any,
        split: Split = "test",
        *,
        batch_size: int = 32,
        autocast: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Measure `model`, on its own device and without changing it; raises ScaloraError if a metric is not finite."""
