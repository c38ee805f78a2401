"""Seconds that the whole program may take: on a lent machine there are few, and what is not written is lost."""

from __future__ import annotations

import time


class OutOfTimeError(Exception):
    """What comes next would not end in time."""


class Budget:
    """So many seconds of the clock from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def ask(self, needed: float = 0.0) -> None:
        """Raises OutOfTimeError where fewer seconds than these are left."""
        if self.left <= needed:
            raise OutOfTimeError
