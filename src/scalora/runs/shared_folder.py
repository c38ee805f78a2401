"""The folder of a run on several processes: the first one holds and writes it, the others know where it is."""

from __future__ import annotations

from pathlib import Path

from ..common.disk_layout import RECIPE
from ..common.errors import ScaloraError
from ..common.files import expand_user
from ..common.processes import from_first
from .folder import RunFolder
from .inputs import Inputs
from .recipe import Recipe


class SharedFolder:
    """A run's folder, as :class:`~scalora.runs.folder.RunFolder` gives it to the first process.

    Raises:
        ScaloraError: as there, or another process does not see it.
    """

    def __init__(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        self._own: RunFolder | None = None

        def opened() -> Path | None:
            self._own = RunFolder(recipe, resume=resume, overwrite=overwrite)
            return self._own.checkpoint

        self.checkpoint = from_first(opened)
        self.trained: Path | None = None  # where this run has saved what it trained
        self.path = expand_user(recipe.output)
        if not (self.path / RECIPE).exists():
            raise ScaloraError(
                f"output is {str(self.path)!r}, which the first process has made and another does not see: choose a "
                "folder that all machines share"
            )

    def settle(self, inputs: Inputs) -> str:
        """See that all processes read the same, and note it; what is to be said of that, if anything.

        Raises:
            ScaloraError: what is read differs between processes, or from what the run began with.
        """

        def settled() -> tuple[str, object]:
            assert self._own is not None
            return self._own.settle(inputs), inputs.encode()

        said, theirs = from_first(settled)
        if self._own is None:
            inputs.refuse_other(theirs, "the first process", "give all machines the same files")
        return said

    def release(self) -> None:
        """Let others in, as RunFolder does."""
        if self._own is not None:
            self._own.release()
