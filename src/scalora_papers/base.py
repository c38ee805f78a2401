"""What an experiment of a paper is: it computes, and says what to write down, to show and to draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure

from scalora.arena.table import TextTable
from scalora.common.errors import ScaloraError

Scale = Literal["small", "paper"]


@dataclass(frozen=True)
class Setting:
    """How an experiment was asked for.

    ``folder`` is its own: whatever it needs to continue an interrupted run it may keep there. ``data`` is the folder
    with GLUE, commonsense and mathematics files (laid out as `tasks.benchmarks` says); None where none was named.
    """

    scale: Scale
    folder: Path
    data: Path | None = None
    log: Callable[[str], None] = print  # takes lines on progress
    command: str = ""
    retry: bool = False  # run failed trials again

    def file(self, relative: str) -> Path:
        """A file of the data folder.

        Raises:
            ScaloraError: no data folder was named, or the file is not in it.
        """
        if self.data is None:
            raise ScaloraError("--data is missing: name the folder that holds the data, e.g. --data ../shared/data")
        if not (self.data / relative).is_file():
            raise ScaloraError(f"--data {self.data}: there is no {relative} in it")
        return self.data / relative


@dataclass(frozen=True)
class Outcome:
    """What an experiment found: ``content`` goes to results.json, figures to PNGs by their names."""

    content: dict[str, Any]
    tables: list[TextTable]
    figures: dict[str, Figure] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)  # in words, what agrees with the paper and what does not


class Experiment(ABC):
    """One figure or table; a file in this package lists its experiments in ``EXPERIMENTS`` and is found by that."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def run(self, setting: Setting) -> Outcome:
        """Compute it.

        Raises:
            ScaloraError: data are missing or wrong.
        """

    def plan(self, setting: Setting) -> Outcome:
        """What the paper-scale run would train and take, found without weights or data.

        Raises:
            ScaloraError: no large model is trained here.
        """
        raise ScaloraError(f"{self.name} trains no large model, so there is nothing to plan: leave --plan out")
