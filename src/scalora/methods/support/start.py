"""Weights as they were before training, for methods that change them densely and whose update is to be measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...common.errors import ScaloraError
from ..method import Spectrum

Named = Callable[[], Iterable[tuple[str, Tensor]]]  # the weights m×n by name, as they are now


class Start:
    """In files, one a weight, until the object goes: a second copy in memory would be taken for the method's own."""

    def __init__(self, weights: Named) -> None:
        self.weights = weights
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def keep(self) -> None:
        """Write the weights as they are now; takes their size on disk, where TMPDIR says.

        Raises:
            ScaloraError: they cannot be written there.
        """
        try:
            self.folder = tempfile.TemporaryDirectory(prefix="scalora-start-")
            for index, (_, weight) in enumerate(self.weights()):
                torch.save(weight.detach().cpu().clone(), self._file(index))
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ScaloraError(
                f"TMPDIR is {tempfile.gettempdir()!r}, where the adapted weights could not be written, from which the "
                f"rank of their update is measured ({reason}): make room there, or set TMPDIR to another folder"
            ) from error

    @torch.no_grad()
    def spectra(self) -> Iterator[tuple[str, Spectrum]]:
        """Singular values of what each weight has gained since :meth:`keep`, float32; one at a time."""
        for index, (name, weight) in enumerate(self.weights()):
            W0 = torch.load(self._file(index), weights_only=True)
            update = weight.float() - W0.to(weight.device).float()
            yield name, Spectrum.of(update)

    def _file(self, index: int) -> Path:
        if self.folder is None:
            raise RuntimeError("Adapted.remember was not called before training")
        return Path(self.folder.name, f"{index}.pt")
