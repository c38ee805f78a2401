"""Which workers live: the signs that they give of the trials they run, and who may call them dead."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

HEARTBEAT = 60.0  # seconds between signs of life of a running trial
SILENCE = 10 * HEARTBEAT  # after which a worker counts as dead


def _where_numbers_hold() -> str:
    """Where a process number means one process: this machine since it was started, and this container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


HERE = _where_numbers_hold()


def sign(taken: optuna.Trial, now: float) -> None:
    """Note on a trial that this process runs it, at a time of the database's clock.

    Raises:
        UpdateFinishedTrialError: another worker took this one for dead.
    """
    taken.set_user_attr("alive", [HERE, os.getpid(), now])


def count_workers(running: Iterable[FrozenTrial], now: float) -> int:
    """Processes that are at work on trials, this one among them."""
    heard = [each for each in running if not _is_gone(each) and now < _last_sign(each)[2] + SILENCE]
    return len({_last_sign(each)[:2] for each in heard} | {(HERE, os.getpid())})


class Watch:
    """What one process has seen of the others' signs of life."""

    def __init__(self) -> None:
        self._since: dict[tuple[int, float], float] = {}  # trial and its last sign → when that was first seen here

    def is_dead(self, running: FrozenTrial, now: float) -> bool:
        """Whether the process that took a trial has ended; how long it was silent is by the database's clock.

        That alone proves nothing: after an outage all are silent, and one that has just taken a trial has given no sign
        yet. So this process must have seen none either, by its own clock, for two heartbeats.
        """
        seen, here = _last_sign(running)[2], time.monotonic()
        since = self._since.setdefault((running.number, seen), here)
        return _is_gone(running) or (now > seen + SILENCE and here > since + 2 * HEARTBEAT)


def _last_sign(frozen: FrozenTrial) -> tuple[str, int, float]:
    """Where a trial's process runs, its number, and when it was last heard of."""
    where, number, seen = frozen.user_attrs.get("alive", ("", -1, 0.0))
    return where, number, seen


def _is_gone(frozen: FrozenTrial) -> bool:
    """Whether a trial's process was one of this machine, and is none any more."""
    where, number, _ = _last_sign(frozen)
    if where != HERE:
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False
