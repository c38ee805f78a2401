"""Waiting for a shared database that is away for a while: a server restarts, a network fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from ..common.errors import ScaloraError
from .storage import AWAY, Storage, reason

_PATIENCE, _PAUSE = 300.0, 5.0  # seconds for which a database may be away, and between looks at it


class Patient:
    """What has a database that may be away: `storage`; None is a file of this machine, which is not waited for.

    `patience` seconds are waited; `folder` is where the user finds what has been done so far.
    """

    def __init__(self, folder: Path, storage: Storage | None, log: Callable[[str], None]) -> None:
        self.folder, self.storage, self.patience, self._log = folder, storage, _PATIENCE, log

    def wait(self, error: Exception, begun: float | None) -> float:
        """Let a while pass since a database was first found away; when that was, by this process's clock.

        Raises:
            ScaloraError: it stayed away.
            Exception: the `error`, where there is nothing to wait for.
        """
        if self.storage is None:
            raise error
        now, why = time.monotonic(), reason(error, self.storage)
        if begun is None:
            begun = now
            if self.patience:
                self._log(f"{self.storage} does not answer ({why}): waiting {self.patience:.0f} s for it")
        if now >= begun + self.patience:
            self.patience = 0.0  # there is no second wait on the way out
            raise ScaloraError(
                f"{self.storage} does not answer ({why}): see to the server; the same command then goes on, with what "
                f"is in {self.folder}"
            ) from None
        time.sleep(_PAUSE)
        return begun


_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")
_Self = TypeVar("_Self", bound=Patient)


def patient(operation: Callable[Concatenate[_Self, _Given], _Found]) -> Callable[Concatenate[_Self, _Given], _Found]:
    """A method that is tried again while the database is away; doing it twice must be harmless."""

    @wraps(operation)
    def waiting(self: _Self, *args: _Given.args, **kwargs: _Given.kwargs) -> _Found:
        begun = None
        while True:
            try:
                return operation(self, *args, **kwargs)
            except AWAY as error:
                begun = self.wait(error, begun)

    return waiting
