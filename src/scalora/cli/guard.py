"""From exceptions to messages and exit codes: 2 for what the user can mend, 130 where it was stopped."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..common.errors import ScaloraError
from ..common.stopping import listen, was_stopped


@contextmanager
def guarded() -> Iterator[None]:
    """Run a verb; on bad input print one message and leave with code 2, without a traceback."""
    listen()
    try:
        yield
    except KeyboardInterrupt:
        leave("stopped", 130)
    except Exception as error:
        if was_stopped(error):
            leave("stopped", 130)
        if isinstance(error, ScaloraError):
            leave(f"error: {error}", 2)
        raise


def leave(message: str, code: int) -> NoReturn:
    """Print a message to standard error and exit."""
    print(message, file=sys.stderr)
    raise SystemExit(code)


def require(command: str, *modules: str) -> None:
    """Raise ScaloraError for the first module of the arena extra that is not installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ScaloraError(f"{name} is missing: {command} needs pip install 'scalora[arena]'")
