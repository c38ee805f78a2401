"""What went wrong on the way: one method that fails, or does not fit, shall not take the others' figures along."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .budget import OutOfTimeError


class Failures:
    """A list of them, for the results; each is printed as it happens."""

    def __init__(self) -> None:
        self.found: list[dict[str, str]] = []

    @contextmanager
    def noting(self, cell: object, what: str) -> Iterator[None]:
        """Within, an error ends the block, and is noted; whoever asks for a figure finds none."""
        try:
            yield
        except OutOfTimeError:
            raise
        except Exception as error:  # whatever a device has in store
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
            note = {
                "cell": str(cell),
                "what": what,
                "error": f"{kind}: {str(error)[:300]}",
                "at": f"{where.filename.split('/src/')[-1].split('/site-packages/')[-1]}:{where.lineno}",
            }
            self.found.append(note)
            print("FAILED", *note.values(), sep=" | ", flush=True)
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
