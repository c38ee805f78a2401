"""Files that are never half there: written beside their place, then renamed; folders sealed when they are complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .disk_layout import SEAL
from .errors import ScaloraError


def expand_user(path: str | Path) -> Path:
    """A path with the home folder for ~; raises ScaloraError where ~name is no user's, or it can be no path."""
    try:
        return Path(path_text(str(path))).expanduser()
    except ValueError as error:
        raise ScaloraError(str(error)) from error
    except RuntimeError as error:
        raise ScaloraError(f"{str(path)!r} begins with the home of a user that there is not: write it out") from error


def path_text(text: str) -> str:
    """The text where a system can take it for a path; raises ValueError for one that none takes."""
    what = "a null character"
    try:
        if b"\0" not in os.fsencode(text):
            return text
    except UnicodeEncodeError:
        what = "half a character (a lone surrogate)"
    raise ValueError(f"{text!r} holds {what}, which no path can: write the path without it")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any, *, depth: int | None = None) -> None:
    """Write JSON; with ``depth``, lists and objects that lie so deep take one line each, as do those without others."""
    text = json.dumps(content, indent=2, ensure_ascii=False) if depth is None else _compact(content, depth, "")
    write_text(path, text + "\n")


def _compact(value: Any, depth: int, indent: str) -> str:
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    if not depth or not any(isinstance(item, dict | list | tuple) for item in items):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    within = indent + " "
    texts = [_compact(item, depth - 1, within) for item in items]
    if isinstance(value, dict):
        texts = [f"{json.dumps(str(key), ensure_ascii=False)}: {text}" for key, text in zip(value, texts, strict=True)]
    inside = ",\n".join(within + text for text in texts)
    return f"{{\n{inside}\n{indent}}}" if isinstance(value, dict) else f"[\n{inside}\n{indent}]"


def check_writable(folder: Path, option: str) -> None:
    """Whether a folder can be made and written to, before anything is computed for it; nothing is left behind.

    Raises:
        ScaloraError: it cannot; the message names ``option``.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ScaloraError(f"{option} {folder} cannot be written to ({error.strerror}): name another folder") from error


def replace_folder(finished: Path, place: Path) -> None:
    """Put a finished folder in its place. What was there goes last, and comes back where that cannot be done."""
    if not place.exists():
        os.replace(finished, place)
        return
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(place, old)
    try:
        os.replace(finished, place)
    except BaseException:
        os.replace(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def digest(path: Path) -> str:
    """The sha256 of a file; of a folder, that of its sorted `sha256  relative/path` lines."""
    if path.is_file():
        with path.open("rb") as stream:
            hasher = hashlib.sha256()
            while block := stream.read(1 << 20):
                hasher.update(block)
        return hasher.hexdigest()
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(f"{digest(file)}  {name}\n" for name, file in files).encode()).hexdigest()


def seal(folder: Path) -> None:
    """Declare a folder complete: its last file lists size and sha256 of all others."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SEAL)
    listed = {file.relative_to(folder).as_posix(): [file.stat().st_size, digest(file)] for file in files}
    write_json(folder / SEAL, listed)


def is_sealed(folder: Path) -> bool:
    """Whether a folder was completed; what is in it now is for :func:`damage` to say."""
    return (folder / SEAL).is_file()


def damage(folder: Path, *, content: bool = True) -> str | None:
    """What differs in a sealed folder from the day it was sealed; None if nothing does.

    Without ``content`` only sizes are compared, which costs nothing.
    """
    try:
        listed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{SEAL} cannot be read"
    for name, (size, sha256) in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes and had {size}"
        if content and digest(file) != sha256:
            return f"{name} has other content than was written"
    return None
