"""Room for a run: which folders may be written anew, and where an earlier run stays (--overwrite)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..common.disk_layout import ADAPTER, CHECKPOINTS, INPUTS, METRICS, RECIPE
from ..common.errors import ScaloraError
from ..common.files import is_sealed

_LOCK = ".lock"


def is_free(folder: Path) -> bool:
    """Whether there is nothing that anyone could lose: no folder, an empty one, or the shell of a run killed early."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    # Only a run leaves a lock: a recipe alone may be what its author wrote.
    shell = {_LOCK, RECIPE, INPUTS, CHECKPOINTS, f".{RECIPE}.tmp", f".{INPUTS}.tmp"}
    return not names or (_LOCK in names and names <= shell and not _has_checkpoint(folder))


def is_run(folder: Path) -> bool:
    """Whether a run of ours lies there: its recipe, and something that only a run writes."""
    left = (folder / INPUTS).is_file() or (folder / METRICS).is_file() or (folder / ADAPTER).is_dir()
    return (folder / RECIPE).is_file() and (left or _has_checkpoint(folder))


class Room:
    """Where an earlier run goes that a new one replaces, until :meth:`keep` or :meth:`give_back`.

    It becomes ``<output>.previous``, and what was there goes. A run that is not finished goes itself where there is a
    finished one. Whatever goes is only put aside before the new run has left something.
    """

    def __init__(self, folder: Path) -> None:
        whole = folder if folder.name not in ("", "..") else folder.resolve()
        self.folder = folder
        self.previous = whole.parent / f"{whole.name}.previous"
        self.said = ""  # what becomes of the earlier run
        self._going = whole.parent / f".{whole.name}.overwritten"
        self._moves: list[tuple[Path, Path]] = []

    def make(self) -> None:
        """Move the earlier run out of the way.

        Raises:
            ScaloraError: it is no run, or what would have to go for it is none; or one of them is at work.
        """
        self._check()
        with _unused(self.folder), _unused(self.previous):
            self._tidy()
            before = os.path.lexists(self.previous)
            finished = (self.folder / METRICS).exists()
            if before and not finished and (self.previous / METRICS).exists():
                self._move(self.folder, self._going)
                self.said = (
                    f"the run that was in {str(self.folder)!r} was not finished, and goes once this one has left "
                    f"something; {str(self.previous)!r} keeps the finished one"
                )
                return
            instead = ", in place of the run that was there" if is_run(self.previous) else ""
            self.said = f"the run that was in {str(self.folder)!r} is kept in {str(self.previous)!r}{instead}"
            if before:
                self._move(self.previous, self._going)
            self._move(self.folder, self.previous)

    def keep(self) -> None:
        """The new run has left something: let what it replaces go."""
        self._moves.clear()
        self._tidy()

    def give_back(self) -> None:
        """The new run came to nothing: everything is where it was."""
        for source, target in reversed(self._moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.replace(target, source)
        self._moves.clear()

    def _check(self) -> None:
        name = repr(str(self.folder))
        if not is_run(self.folder):
            raise ScaloraError(
                f"output is {name}, which is not a run of scalora and will not be replaced: choose another "
                "(--set output=...)"
            )
        if Path.cwd().is_relative_to(self.folder.resolve()):
            raise ScaloraError(
                f"output is {name}, the folder that you are in, which cannot be replaced from within: go out of it, "
                "or choose another (--set output=...)"
            )
        for place in (self.previous, self._going):
            if os.path.lexists(place) and not _may_go(place):
                raise ScaloraError(
                    f"{str(place)!r} is not a run of scalora, and --overwrite needs its name for what is in {name}: "
                    "rename it, or choose another output (--set output=...)"
                )

    def _move(self, source: Path, target: Path) -> None:
        self._moves.append((source, target))  # first, so that a stop in between loses nothing
        os.replace(source, target)

    def _tidy(self) -> None:
        """Let go what is aside, also that of a process which was killed; unless it is all there is."""
        if not _may_go(self._going):
            return
        if not os.path.lexists(self.previous):
            os.replace(self._going, self.previous)
        elif self._going.is_symlink():
            self._going.unlink()
        else:
            shutil.rmtree(self._going, ignore_errors=True)


def lock(folder: Path) -> FileLock:
    """Held by this process until it releases it or ends, however it ends."""
    held = FileLock(folder / _LOCK, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise ScaloraError(
            f"output is {str(folder)!r}, where another run is at work: wait for it, or choose another "
            "(--set output=...)"
        ) from None
    return held


@contextmanager
def _unused(folder: Path) -> Iterator[None]:
    """Within, no run can begin there. Where there is no lock none is at work, and nothing is written."""
    if not (folder / _LOCK).exists():
        yield
        return
    held = lock(folder)
    try:
        yield
    finally:
        held.release()


def _may_go(place: Path) -> bool:
    return place.is_dir() and (is_free(place) or is_run(place))


def _has_checkpoint(folder: Path) -> bool:
    return any(map(is_sealed, (folder / CHECKPOINTS).glob("checkpoint-*")))
