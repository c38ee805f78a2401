"""Models that are made on the spot, once: trained at the first call and kept in the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from ..common import packaged


def made_once(name: str, save: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache.

    Args:
        name: says all that the model depends on, since a folder that is there is not made again.
        save: makes the model and writes it into the folder that it is given.

    Raises:
        ScaloraError: the cache cannot be written to.
    """
    folder = packaged.cache_dir() / "made" / name
    if folder.exists():
        return folder
    packaged.make_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        save(Path(temporary) / "model")
        try:
            (Path(temporary) / "model").rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder
