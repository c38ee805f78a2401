"""Whether someone has written to an adapter's matrices who should not have: averages of weights do so.

The mean of factors before and after an event is not the factors of any mean. torch counts what is written in place,
but not what is written to ``.data``: for that a sample of values is kept too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SAMPLE = 16  # values of each matrix


class Watched(NamedTuple):
    """What some matrices were like."""

    versions: dict[int, int]  # as torch counts them, by the tensor's id: another tensor counts anew
    sample: Tensor  # on their device, so that nothing waits before it is compared; empty where none is kept

    def equals(self, other: Watched) -> bool:
        """Whether nothing was written since, and the sample is finite: what is not equals nothing, not even itself."""
        same = all(self.versions.get(tensor, version) == version for tensor, version in other.versions.items())
        known = torch.where(self.sample.isfinite(), self.sample, torch.nan)  # without waiting; the comparison waits
        return same and torch.equal(known, other.sample)

    @property
    def is_finite(self) -> bool:
        """Of the sample; waits for the device."""
        return bool(self.sample.isfinite().all())


def watch(matrices: Sequence[Tensor], *, values: bool) -> Watched:
    """What these matrices are like now; ``values``: a sample of them too."""
    versions = {id(t): 0 if t.is_inference() else t._version for t in matrices}
    read = [t.detach().flatten()[:: max(1, t.numel() // _SAMPLE)].float() for t in matrices if values]
    return Watched(versions, torch.cat(read) if read else torch.empty(0))
