"""Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt; and whether one did, although a library made an error of it.

Python before 3.12 turns what is raised in `__set_name__`, as classes are made, into a RuntimeError. transformers' lazy
imports make a ModuleNotFoundError of that ("Could not import module 'LlamaConfig'"), which looks like bad input.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from contextlib import suppress
from typing import Any

from .errors import AgreedError

_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none
_received: set[int] = set()


def stop_signals() -> list[signal.Signals]:
    """The signals that stop a run: SIGHUP, by which a terminal says that it is gone, unless nohup had it ignored."""
    hangup = [] if _HANGUP is None or signal.getsignal(_HANGUP) == signal.SIG_IGN else [_HANGUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def listen() -> None:
    """From now on all of them raise KeyboardInterrupt, and are remembered; what tidies up does so after each."""
    _received.clear()
    for number in stop_signals():
        signal.signal(number, stop)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Forgiving) and stream is not None and stream.isatty():
            setattr(sys, name, Forgiving(stream))


def stop(number: int, frame: Any) -> None:
    """A signal's handler."""
    _received.add(number)
    let_go(number)
    raise KeyboardInterrupt


def let_go(number: int) -> None:
    """After SIGHUP, send what is still said nowhere: a terminal that is gone answers each line with an error."""
    if number != _HANGUP:
        return
    with open(os.devnull, "r+b") as nowhere:
        for standard in (0, 1, 2):
            with suppress(OSError):  # closed
                if stat.S_ISCHR(os.fstat(standard).st_mode):
                    os.dup2(nowhere.fileno(), standard)


class Forgiving:
    """A stream to a terminal that may go away: what is said after that is lost, and is no error of who says it.

    The kernel closes a terminal before Python has heard of SIGHUP.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Any, *text: str) -> None:
        try:
            act(*text)
        except OSError as error:
            if error.errno != errno.EIO or _HANGUP is None:
                raise
            let_go(_HANGUP)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
