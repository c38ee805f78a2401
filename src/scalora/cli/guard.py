"""From exceptions to messages and exit codes: 2 for what the user can mend, 130 where it was stopped."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..common.errors import AgreedError, ScaloraError
from ..common.launch import launched, speaks
from ..common.stopping import led_to, listen, was_stopped


@contextmanager
def guarded() -> Iterator[None]:
    """Run a verb; on bad input print one message and leave with code 2, without a traceback."""
    listen()
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if was_stopped(error):
            leave("stopped", 130)
        agreed = next((each for each in led_to(error) if isinstance(each, AgreedError)), None)
        if agreed or isinstance(error, ScaloraError):
            leave(f"error: {agreed or error}", 2, alone=agreed is None)
        raise


def leave(message: str, code: int, *, alone: bool = False) -> NoReturn:
    """Print a message to standard error and exit; of several processes the first prints, or the one that is alone."""
    if launched() > 1:  # the launcher ends all once one has ended: each says its own first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if alone or speaks():
        print(message, file=sys.stderr, flush=True)
    elif code == 2:  # the one that speaks may not have come so far
        _wait_to_be_ended(code)
    if alone and launched() > 1:  # Python would wait for what the others never answer
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


def _wait_to_be_ended(code: int, seconds: float = 60.0) -> None:
    """Exit with the code at SIGTERM, which a launcher sends once the process that speaks has left; or return later."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.1)


def alone(command: str) -> None:
    """Raise ScaloraError where a launcher has started several processes for a command that is for one."""
    if launched() > 1:
        raise AgreedError(
            f"WORLD_SIZE is {launched()}, but scalora {command} runs in one process, and several of them would do the "
            "same: start it without torchrun and accelerate launch"
        )


def require(command: str, *modules: str) -> None:
    """Raise ScaloraError for the first module of the arena extra that is not installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ScaloraError(f"{name} is missing: {command} needs pip install 'scalora[arena]'")
