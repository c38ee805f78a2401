"""The folder of one run: claimed before anything expensive starts, and never half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .errors import ScaloraError

if TYPE_CHECKING:
    from .recipes import Recipe  # itself slow to import

RECIPE, METRICS, CHECKPOINTS = "recipe.yaml", "metrics.json", "checkpoints"


def claim(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path:
    """Make sure of a writable folder that holds nothing, or just what is to be resumed.

    With ``overwrite`` an earlier run's folder is kept as ``<output>.previous``.

    Raises:
        ScaloraError: it holds another run, there is nothing to resume, or it cannot be written.
    """
    folder = Path(recipe.output).expanduser()
    try:
        if resume:
            _check_resumable(folder, recipe)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not overwrite:
                raise ScaloraError(
                    f"output is {str(folder)!r}, which is not empty: choose another (--set output=...), continue it "
                    "(--resume), or replace it (--overwrite keeps it as .previous)"
                )
            if not folder.is_dir() or not (folder / RECIPE).exists():
                raise ScaloraError(f"output is {str(folder)!r}, which is not a run of scalora: it will not be replaced")
            shutil.rmtree(_previous(folder), ignore_errors=True)
            os.replace(folder, _previous(folder))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECIPE, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise ScaloraError(f"output is {str(folder)!r}, which cannot be written: {error.strerror or error}") from error
    return folder


def release(folder: Path, *, overwrite: bool) -> None:
    """Take back :func:`claim` where the run came to nothing: without checkpoint or adapter no shell stays behind."""
    if last_checkpoint(folder) is None and not (folder / "adapter").exists():
        shutil.rmtree(folder, ignore_errors=True)
        if overwrite and _previous(folder).exists():
            os.replace(_previous(folder), folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [p for p in (folder / CHECKPOINTS).glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _previous(folder: Path) -> Path:
    return folder.with_name(folder.name + ".previous")


def _check_resumable(folder: Path, recipe: Recipe) -> None:
    if (folder / METRICS).exists():
        raise ScaloraError(
            f"the run in {str(folder)!r} is finished: there is nothing to resume (--overwrite starts anew)"
        )
    if last_checkpoint(folder) is None:
        raise ScaloraError(f"there is no checkpoint in {str(folder)!r} to resume from: start it without --resume")
    saved = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    for key, value in recipe.model_dump(mode="json").items():
        if saved.get(key) != value:
            raise ScaloraError(f"{key} differs from that of the run in {str(folder)!r}: resume with the same recipe")
