"""Whether this process is one of several that a launcher has started; told by what launchers set, without torch."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes torchrun, accelerate or the like have started for one run; 1 where none has."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def speaks() -> bool:
    """Whether this is the process that tells what happens: the only one, or the first."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"
