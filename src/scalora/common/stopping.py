"""Ctrl-C and SIGTERM raise KeyboardInterrupt; and whether one did, although a library made an error of its own of it.

Python before 3.12 turns what is raised in `__set_name__`, as classes are made, into a RuntimeError. transformers' lazy
imports make a ModuleNotFoundError of that ("Could not import module 'LlamaConfig'"), which looks like bad input.
"""

from __future__ import annotations

import signal
from typing import Any

_received = False


def listen() -> None:
    """From now on both signals raise KeyboardInterrupt, and are remembered; what tidies up does so after both."""
    global _received
    _received = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: Any) -> None:
    global _received
    _received = True
    raise KeyboardInterrupt


def was_stopped(error: BaseException) -> bool:
    """Whether a signal came since :func:`listen`, or an interrupt is among what led to an error."""
    found: list[BaseException | None] = [error]
    for each in found:
        if isinstance(each, KeyboardInterrupt):
            return True
        if each is not None:
            found += [cause for cause in (each.__cause__, each.__context__) if cause not in found]
    return _received
