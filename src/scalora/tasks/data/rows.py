"""Rows for a task: read from files, packaged data or the hub, renamed, checked and split.

Data sets here are small, so rows are plain dicts held in lists.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...common.errors import ScaloraError
from ...common.files import path_text
from ...common.numeric import numbers_only
from .delimited import seems_separated
from .forms import Row, adapt
from .reading import read_source
from .source import BadRow
from .tally import Tally
from .values import flaw, label_key, lookalike, shown


class DataSpec(BaseModel):
    """Where rows come from and how many are used.

    A source is a packaged alias, a .json/.jsonl/.csv/.tsv/.parquet/.txt file, a pattern of files that are a document
    each (`notes/**/*.md`), a folder of images, or a hub id (`owner/name`, or `owner/name:config`). Without a source of
    their own, validation and test rows are split off from train.
    """

    model_config = ConfigDict(extra="forbid")
    _numbers = model_validator(mode="before")(numbers_only)

    train: str
    validation: str | None = None
    test: str | None = None
    folder: str = "."
    """The folder that relative paths of files start from."""
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    train_size: int | None = Field(default=None, ge=1)
    validation_size: int | None = Field(default=None, ge=1)
    test_size: int | None = Field(default=None, ge=1)
    max_characters: int | None = Field(default=None, ge=1)
    """Rows whose columns hold more than this together are left out, of every split."""
    max_bad_rows: int = Field(default=0, ge=0)
    """How many rows of a source may be left out since they are malformed; with more the first is refused."""
    max_long_rows: int | None = Field(default=None, ge=0)
    """How many rows of a split may be left out since they do not fit the task's max_length. None: any number."""
    columns: dict[str, str] = {}
    """Our name -> theirs, where they differ. In a .tsv without a header, theirs are positions ("0", "1", …)."""
    values: dict[str, list[str | bool | int]] = {}
    """Our name -> all that the column may hold; a row with another value is refused, by its place in the file."""
    form: Literal["published"] | None = None
    """Whether a file in the form of a published set has that form's columns instead of its own. None: beside them."""
    missing: Literal["refuse", "keep"] = "refuse"
    """What becomes of labels and texts that are empty or say NaN, None, NA, …: keep takes them as they stand."""
    seed: int = 0

    @field_validator("train", "validation", "test", "folder")
    @classmethod
    def _can_be_paths(cls, value: str | None) -> str | None:
        return None if value is None else path_text(value)


class PlacedRow(Row):
    """A row, under our names, that knows its file and line (or number) for messages, and which of them comes first."""

    __slots__ = ("line", "place")

    def __init__(self, cells: Row, place: str, line: int = 0) -> None:
        super().__init__(cells)
        self.place = place
        self.line = line

    def __reduce__(self) -> tuple[Any, ...]:
        return PlacedRow, (dict(self), self.place, self.line)


Check = Callable[[PlacedRow], None]
"""Raises ScaloraError for a row whose values cannot be used."""


class Splits(NamedTuple):
    """Rows to train on, to choose a checkpoint by (if any), and to report on."""

    train: list[PlacedRow]
    validation: list[PlacedRow] | None
    test: list[PlacedRow]


def load_splits(
    spec: DataSpec,
    required: Sequence[str],
    check: Check | None = None,
    say: Callable[[str], None] = lambda line: None,
    optional: Mapping[str, bool] = MappingProxyType({}),
    tally: Tally | None = None,
) -> Splits:
    """The rows of every split, cut down to the `required` columns and the `optional` ones, under our names.

    Rows split off from train come from one shuffle (by `spec.seed`) of its distinct rows: first test, then validation,
    then train; so no row is in two splits, and the test split does not depend on the other sizes.

    Args:
        spec: where rows come from.
        required: columns, under our names.
        check: raises ScaloraError for a row whose values cannot be used.
        say: takes a line, with numbers, for whatever is done to the rows that was not asked for by name.
        optional: columns, under our names, that rows may lack or have empty; then they are null. True: some row of
            train must have it, as one must where `spec` names it.
        tally: takes how many rows are malformed, for those who find more of them.

    Raises:
        ScaloraError: a source is missing or malformed, lacks a column, or holds fewer rows than asked for.
    """
    if spec.test is None and spec.test_size is None:
        raise ScaloraError("task.data.test: there is no test data; name a source, or set test_size to split it off")
    load = partial(_load, spec, required=required, check=check, say=say, optional=optional, tally=tally or Tally())
    train = load("train", spec.train)
    read = len(train)
    if spec.test is None or (spec.validation is None and spec.validation_size):
        # A row that occurs twice could otherwise be trained on and tested on.
        train = list({_key(row): row for row in train}.values())
    if repeated := read - len(train):
        say(
            f"task.data.train: {repeated} of {read} rows say the same as others in all columns that are used, and are "
            "left out, so that none is in two splits"
        )
    without = f" ({repeated} of {read} repeat others and are left out)" if repeated else ""
    train = _shuffled(train, spec.seed)
    test, train = _held_out(spec, "test", load, train, without)
    validation, train = _held_out(spec, "validation", load, train, without)
    if spec.train_size is not None:
        train = _take("train", train, spec.train_size, without=without)
    splits = Splits(train, validation or None, test)
    _tell_shared(spec, splits, say)
    return splits


def _key(row: PlacedRow) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def digest_rows(rows: Sequence[PlacedRow]) -> str:
    """How many rows, and a digest of their columns, in their order: the same for the same rows from another place."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(_key(row).encode() + b"\n")
    return f"{len(rows)} rows, {hasher.hexdigest()[:16]}"


def _tell_shared(spec: DataSpec, splits: Splits, say: Callable[[str], None]) -> None:
    """Rows of a source of its own are kept as they are; it is said how many of them are trained on too."""
    trained = None
    for name, rows in (("validation", splits.validation), ("test", splits.test)):
        if getattr(spec, name) is not None and rows:
            trained = trained or set(map(_key, splits.train))
            if shared := sum(_key(row) in trained for row in rows):
                say(f"task.data.{name}: {shared} of {len(rows)} rows are among those that are trained on")


def _held_out(
    spec: DataSpec, name: str, load: Callable[[str, str], list[PlacedRow]], train: list[PlacedRow], without: str
) -> tuple[list[PlacedRow], list[PlacedRow]]:
    """The rows of one split (none if it is not asked for), and what is left of train."""
    own, size = getattr(spec, name), getattr(spec, f"{name}_size")
    if own is None:
        return (_take(name, train, size, spare=1, without=without), train[size:]) if size else ([], train)
    rows = load(name, own)
    return (_take(name, _shuffled(rows, spec.seed), size) if size else rows), train


def _shuffled(rows: list[PlacedRow], seed: int) -> list[PlacedRow]:
    return random.Random(seed).sample(rows, len(rows))


def _take(name: str, rows: list[PlacedRow], size: int, spare: int = 0, without: str = "") -> list[PlacedRow]:
    if size + spare > len(rows):
        raise ScaloraError(
            f"task.data.{name}_size is {size}, but there are only {len(rows)} rows for it"
            f"{' and training' if spare else ''}{without}; lower it"
        )
    return rows[:size]


def _load(
    spec: DataSpec,
    name: str,
    source: str,
    required: Sequence[str],
    check: Check | None,
    say: Callable[[str], None],
    optional: Mapping[str, bool],
    tally: Tally,
) -> list[PlacedRow]:
    bad: list[BadRow] = []
    table = read_source(
        name, source, folder=spec.folder, theirs=spec.columns.values(), split=getattr(spec, f"{name}_split"),
        bad=bad if spec.max_bad_rows else None,
    )  # fmt: skip
    if not table.rows:
        raise bad[0].error if bad else ScaloraError(f"task.data.{name}: {source} holds no rows")
    wanted = {at: spec.columns.get(at, at) for at in (*required, *spec.columns, *spec.values) if at not in optional}
    published = spec.form == "published"
    rows = adapt(source, table.rows, lambda number: table.place(source, number), wanted.values(), published=published)
    allowed = {ours: {label_key(value) for value in values} for ours, values in spec.values.items()}
    for ours, theirs in wanted.items():
        if not any(theirs in row for row in rows):
            raise _no_column(_all_columns(rows), ours, theirs, source)
    spared = {ours: spec.columns.get(ours, ours) for ours in optional}
    for ours, theirs in spared.items():
        if (optional[ours] or ours in spec.columns) and not any(theirs in row for row in rows):
            if name == "train":
                raise _no_column(_all_columns(rows), ours, theirs, source)
            say(f"task.data.{name}: no row of {source} has the column {theirs!r}")
    total, kept = len(bad) + len(rows), []
    tally.count(name, total)
    for number, row in enumerate(rows, 1):
        place, line = table.place(source, number), table.lines[number - 1] if table.lines else number
        try:
            given = wanted | {
                ours: at for ours, at in spared.items() if ours in allowed and row.get(at) not in (None, "")
            }
            _check_cells(spec, name, row, given, allowed, place)
            cells = {ours: row.get(theirs) for ours, theirs in (spared | wanted).items()}
            placed = PlacedRow(cells, place, line)
            if check:
                check(placed)
        except ScaloraError as error:
            if not spec.max_bad_rows:
                raise
            bad.append(BadRow(line, error))
        else:
            kept.append(placed)
    if bad:
        say(tally.leave_out(name, name, bad, total, spec.max_bad_rows))
    return _short_enough(spec, name, source, kept, say)


def _check_cells(
    spec: DataSpec, name: str, row: Row, wanted: dict[str, str], allowed: dict[str, set[str]], place: str
) -> None:
    """Raise ScaloraError where a row lacks a column that is wanted, or a value is none that it may be."""
    for ours, theirs in wanted.items():
        if theirs not in row:
            raise _no_column(row, ours, theirs, place)
        value = row[theirs]
        if value is None or value != value:  # NaN
            raise ScaloraError(f"task.data.{name}: column {theirs!r} {flaw(value)} in {place}; fill or drop it")
        if ours in allowed and (flaw(value) or label_key(value) not in allowed[ours]):
            hidden = " (the label is hidden: this split has no labels)" if value in ("", "-1", -1) else ""
            raise ScaloraError(
                f"task.data.{name}: column {theirs!r} is {shown(value)} in {place}{hidden}; "
                f"use {list(map(str, spec.values[ours]))}{lookalike(value, spec.values[ours])}"
            )


def _short_enough(
    spec: DataSpec, name: str, source: str, kept: list[PlacedRow], say: Callable[[str], None]
) -> list[PlacedRow]:
    """The rows that hold no more than `max_characters`."""
    if spec.max_characters is None:
        return kept
    lengths = [sum(len(str(value)) for value in row.values()) for row in kept]
    if min(lengths) > spec.max_characters:
        raise ScaloraError(
            f"task.data.max_characters is {spec.max_characters}, but the shortest row of {source} has {min(lengths)}"
        )
    short = [row for row, length in zip(kept, lengths, strict=True) if length <= spec.max_characters]
    if long := len(kept) - len(short):
        say(
            f"task.data.{name}: {long} of {len(kept)} rows have more than {spec.max_characters} characters "
            "(max_characters) and are left out"
        )
    return short


def _all_columns(rows: Sequence[Row]) -> Row:
    """The first row, with what others have besides."""
    return {name: value for row in reversed(rows) for name, value in row.items() if name not in rows[0]} | rows[0]


def _no_column(row: Row, ours: str, theirs: str, where: str) -> ScaloraError:
    near = get_close_matches(theirs, row, n=1)
    hint = f" — did you mean {near[0]!r}?" if near else f" (columns maps our names to theirs; we need {ours!r})"
    cells = list(row.values() if all(map(str.isdecimal, row)) else row)
    if where.lower().endswith((".csv", ".tsv")) and (other := seems_separated(cells)):
        hint = other
    elif where.lower().endswith((".csv", ".tsv")) and not near:
        hint += '; if the file has no header, give positions in task.data.columns, e.g. {text: "3", label: "1"}'
    return ScaloraError(f"task.data.columns: no column {theirs!r} in {where}; it has {', '.join(row)}{hint}")
