"""Rows for a task: read from files, packaged data or the hub, renamed, checked and split.

Data sets here are small, so rows are plain dicts held in lists.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from . import assets
from .errors import ScaloraError

Row = dict[str, Any]
DIGITS = ("digits", "digits-turned")  # made on the spot by scalora.dense


class DataSpec(BaseModel):
    """Where rows come from and how many are used.

    A source is a packaged alias, a .json/.jsonl/.csv/.tsv/.parquet file, or a hub id (`owner/name`, or
    `owner/name:config`). Without a source of their own, validation and test rows are split off from train.
    """

    model_config = ConfigDict(extra="forbid")

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
    columns: dict[str, str] = {}
    """Our name -> theirs, where they differ. In a .tsv without a header, theirs are positions ("0", "1", …)."""
    seed: int = 0


class Splits(NamedTuple):
    """Rows to train on, to choose a checkpoint by (if any), and to report on."""

    train: list[Row]
    validation: list[Row] | None
    test: list[Row]


def load_splits(spec: DataSpec, required: Sequence[str]) -> Splits:
    """The rows of every split, cut down to the `required` columns, under our names.

    Rows split off from train come from one shuffle (by `spec.seed`) of its distinct rows: first test, then validation,
    then train; so no row is in two splits, and the test split does not depend on the other sizes.

    Raises:
        ScaloraError: a source is missing or malformed, lacks a column, or holds fewer rows than asked for.
    """
    if spec.test is None and spec.test_size is None:
        raise ScaloraError("task.data.test: there is no test data; name a source, or set test_size to split it off")
    train = _load(spec, "train", spec.train, required)
    if spec.test is None or (spec.validation is None and spec.validation_size):
        # A row that occurs twice could otherwise be trained on and tested on.
        train = list({json.dumps(row, sort_keys=True, default=str): row for row in train}.values())
    train = _shuffled(train, spec.seed)
    test, train = _held_out(spec, "test", required, train)
    validation, train = _held_out(spec, "validation", required, train)
    if spec.train_size is not None:
        train = _take("train", train, spec.train_size)
    return Splits(train, validation or None, test)


def _held_out(spec: DataSpec, name: str, required: Sequence[str], train: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of one split (none if it is not asked for), and what is left of train."""
    source, size = getattr(spec, name), getattr(spec, f"{name}_size")
    if source is None:
        return (_take(name, train, size, spare=1), train[size:]) if size else ([], train)
    rows = _load(spec, name, source, required)
    return (_take(name, _shuffled(rows, spec.seed), size) if size else rows), train


def _shuffled(rows: list[Row], seed: int) -> list[Row]:
    return random.Random(seed).sample(rows, len(rows))


def _take(name: str, rows: list[Row], size: int, spare: int = 0) -> list[Row]:
    if size + spare > len(rows):
        raise ScaloraError(
            f"task.data.{name}_size is {size}, but there are only {len(rows)} rows for it"
            f"{' and training' if spare else ''}; lower it"
        )
    return rows[:size]


def _load(spec: DataSpec, name: str, source: str, required: Sequence[str]) -> list[Row]:
    rows = _read(name, source, spec, headerless=_are_positions(spec.columns))
    if not rows:
        raise ScaloraError(f"task.data.{name}: {source} holds no rows")
    rows = _adapt(source, rows)
    wanted = {ours: spec.columns.get(ours, ours) for ours in (*required, *spec.columns)}
    for number, row in enumerate(rows, 1):
        for ours, theirs in wanted.items():
            if theirs not in row:
                near = get_close_matches(theirs, row, n=1)
                where = source if number == 1 else f"row {number} of {source}"
                hint = (
                    f" — did you mean {near[0]!r}?"
                    if near
                    else f" (columns maps our names to theirs; we need {ours!r})"
                )
                raise ScaloraError(f"task.data.columns: no column {theirs!r} in {where}; it has {', '.join(row)}{hint}")
            if row[theirs] is None:
                raise ScaloraError(
                    f"task.data.{name}: column {theirs!r} is null in row {number} of {source}; fill or drop it"
                )
    return [{ours: row[theirs] for ours, theirs in wanted.items()} for row in rows]


def _are_positions(columns: dict[str, str]) -> bool:
    return bool(columns) and all(theirs.isdecimal() for theirs in columns.values())


def _read(name: str, source: str, spec: DataSpec, *, headerless: bool) -> list[Row]:
    if source in DIGITS:
        from .dense import digit_rows

        return digit_rows(source)
    if source in assets.ASSETS:
        if assets.ASSETS[source].kind != "data":
            raise ScaloraError(f"task.data.{name}: {source!r} is a packaged model; data sets are {_packaged()}")
        return _read_jsonl(assets.fetch(source))
    path = Path(spec.folder).expanduser() / Path(source).expanduser()
    readers = {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".parquet": _read_parquet,
    }
    if path.suffix in readers:
        if not path.is_file():
            raise ScaloraError(
                f"task.data.{name}: there is no file {source} (paths are relative to task.data.folder, "
                f"{Path(spec.folder).expanduser().resolve()})"
            )
        try:
            return _read_tsv(path, headerless) if path.suffix == ".tsv" else readers[path.suffix](path)
        except UnicodeDecodeError as error:
            raise ScaloraError(f"task.data.{name}: {source} is not UTF-8 text ({error}); convert it") from error
    if path.exists() or source.startswith(("/", ".", "~")):
        raise ScaloraError(f"task.data.{name}: {source!r} is no data file; give one that ends in {', '.join(readers)}")
    near = get_close_matches(source, [*assets.ASSETS, *DIGITS], n=1, cutoff=0.8)
    if near:
        raise ScaloraError(f"task.data.{name}: no data set {source!r} — did you mean {near[0]!r}?")
    return _read_hub(name, source, getattr(spec, f"{name}_split"))


def _packaged() -> str:
    return ", ".join((*(name for name, asset in assets.ASSETS.items() if asset.kind == "data"), *DIGITS))


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


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ScaloraError(f"{where}: expected an object with named columns, got {type(value).__name__}")
    return value


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "rename it to .jsonl if it holds one object a line" if error.msg == "Extra data" else "mend the file"
        raise ScaloraError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); {hint}") from error
    if not isinstance(rows, list):
        raise ScaloraError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    return [_object(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in _lines(path):
        try:
            rows.append(_object(json.loads(line), f"{path}, line {number}"))
        except json.JSONDecodeError as error:
            raise ScaloraError(
                f"{path}, line {number}: not valid JSON ({error.msg}); mend or remove the line"
            ) from error
    return rows


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    # Split at line feeds only: str.splitlines would also cut at the odd separators that web text contains.
    text = path.read_text(encoding="utf-8-sig")
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _read_tsv(path: Path, headerless: bool = False) -> list[Row]:
    """Tab-separated text as GLUE has it: quotes are ordinary characters."""
    return _table(path, ((number, line.split("\t")) for number, line in _lines(path)), headerless)


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        return _table(path, ((reader.line_num, cells) for cells in reader if cells), headerless=False)


def _table(path: Path, lines: Iterable[tuple[int, list[str]]], headerless: bool) -> list[Row]:
    names: list[str] = []
    rows = []
    for number, cells in lines:
        if not names:
            names = [str(i) for i in range(len(cells))] if headerless else cells
            if "" in names or len(set(names)) < len(names):
                raise ScaloraError(
                    f"{path}, line {number}: a header needs distinct names, this has {names}; for a .tsv without a "
                    'header, give positions in task.data.columns, e.g. {text: "3", label: "1"}'
                )
            if not headerless:
                continue
        if len(cells) != len(names):
            raise ScaloraError(
                f"{path}, line {number}: {len(cells)} fields, but the first line has {len(names)}; mend or remove it"
            )
        rows.append(dict(zip(names, cells, strict=True)))
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ScaloraError(f"{path}: not a readable parquet file ({error})") from error


def _adapt(source: str, rows: list[Row]) -> list[Row]:
    """Clean columns for the three published forms that hide theirs in prose; other rows as they are."""
    if source in assets.ASSETS:
        adapter = {"sarcasm": _sarcasm, "socialiqa": _socialiqa}[source]
    elif {"instruction", "answer"} <= set(rows[0]) <= {"instruction", "input", "output", "answer"} and (
        "Answer format:" in str(rows[0]["instruction"])
    ):
        adapter = _commonsense
    else:
        return rows
    adapted = []
    for number, row in enumerate(rows, 1):
        try:
            adapted.append(adapter(row))
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            name = adapter.__name__.strip("_")
            raise ScaloraError(
                f"{source}, row {number}: not in the form of the {name} data ({error}): {row}"
            ) from error
    return adapted


def _sarcasm(row: Row) -> Row:
    return {"headline": row["input"][1]["content"], "label": int(row["ideal"])}


def _socialiqa(row: Row) -> Row:
    question, *choices = re.split(r"\s*\bA: |; B: |; C: ", row["input"][0]["content"].removesuffix("."))
    if len(choices) != 3:
        raise ValueError(f"{len(choices)} choices")
    return {"question": question, "choices": choices, "answer": "ABC".index(row["ideal"])}


def _commonsense(row: Row) -> Row:
    """LLM-Adapters (github AGI-Edgerunners/LLM-Adapters): the instruction holds question, choices and answer names."""
    body, _, answer_format = row["instruction"].rpartition("Answer format:")
    names = answer_format.strip().split("/")
    question = re.sub(r"^Please (choose|answer)[^:]*:\s*", "", body.strip())
    choices = names
    if names != ["true", "false"]:
        pattern = "(.*?)" + "".join(rf"\s*\b{re.escape(name.capitalize())}:(.*?)" for name in names)
        found = re.fullmatch(pattern, question, re.DOTALL)
        if not found:
            raise ValueError(f"not all of {', '.join(names)} follow the question")
        question, *choices = (part.strip() for part in found.groups())
    return {**row, "question": question, "choices": choices, "answer": names.index(row["answer"])}
