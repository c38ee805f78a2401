"""Ctrl-C and SIGTERM raise KeyboardInterrupt; and whether one did, although a library made an error of its own of it.

Python before 3.12 turns what is raised in `__set_name__`, as classes are made, into a RuntimeError. transformers' lazy
imports make a ModuleNotFoundError of that ("Could not import module 'LlamaConfig'"), which looks like bad input.
"""

from __future__ import annotations

import signal
from typing import Any

from .errors import AgreedError

_received: set[int] = set()


def listen() -> None:
    """From now on both signals raise KeyboardInterrupt, and are remembered; what tidies up does so after both."""
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def stop(number: int, frame: Any) -> None:
    """A signal's handler."""
    _received.add(number)
    raise KeyboardInterrupt


def was_stopped(error: BaseException) -> bool:
    """Whether a signal came since :func:`listen`, or an interrupt is among what led to an error.

    A launcher sends SIGTERM to the processes that are left when one has ended: that is not what stopped them.
    """
    chain = led_to(error)
    if any(isinstance(each, AgreedError) for each in chain):
        return signal.SIGINT in _received
    return bool(_received) or any(isinstance(each, KeyboardInterrupt) for each in chain)


def led_to(error: BaseException) -> list[BaseException]:
    """The error, and those that it was raised from or while handling."""
    found = [error]
    for each in found:
        found += [cause for cause in (each.__cause__, each.__context__) if cause is not None and cause not in found]
    return found
