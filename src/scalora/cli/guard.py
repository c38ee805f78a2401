"""From exceptions to messages and exit codes: 2 for what the user can mend, 130 where it was stopped."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..common.errors import ScaloraError


@contextmanager
def guarded() -> Iterator[None]:
    """Run a verb; on bad input print one message and leave with code 2, without a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what tidies up after Ctrl-C does so then too
    try:
        yield
    except ScaloraError as error:
        leave(f"error: {error}", 2)
    except KeyboardInterrupt:
        leave("stopped", 130)


def leave(message: str, code: int) -> NoReturn:
    """Print a message to standard error and exit."""
    print(message, file=sys.stderr)
    raise SystemExit(code)


def require(command: str, *modules: str) -> None:
    """Raise ScaloraError for the first module of the arena extra that is not installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ScaloraError(f"{name} is missing: {command} needs pip install 'scalora[arena]'")
