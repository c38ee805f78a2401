"""Rows of different length in one batch: padded on the left, where the model reads each as it would alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..common.errors import ScaloraError

_SHORT, _PADDED = 8, 16  # tokens of the row that is probed, and of padding before it
_SAME = 1e-4  # what padding holds must not count at all, in any dtype


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, int64 `[rows, length]`: padding before every row, so that all end at the same place."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(length, device=device) >= length - lengths[:, None]).long()


def last_logits(model: Any, rows: Sequence[Sequence[int]], keep: int, pad: int, device: torch.device) -> torch.Tensor:
    """Logits `[rows, keep, vocabulary]` at the last positions.

    Padding is on the left, so that the last positions are the same in every row and no others need logits; positions
    are then counted from each row's first real token, as if there was no padding.
    """
    ids, mask = pad_left(rows, pad, device)
    options: dict[str, Any] = {"attention_mask": mask, "logits_to_keep": keep, "use_cache": False}
    if not mask.all():
        # Rows of one length are read as in training, where the model counts by itself: some count from 2.
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    # A PEFT model hands its arguments on to the model inside. Not every model knows every option: BLOOM, say, finds
    # positions from the mask by itself.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inner.forward).parameters
    return model(input_ids=ids, **{name: value for name, value in options.items() if name in known}).logits[:, -keep:]


def reads_alike(
    read: Callable[[Sequence[Sequence[int]], int], torch.Tensor],
    rows: Sequence[Sequence[int]],
    pad: int,
    dtype: torch.dtype,
) -> bool:
    """Whether a row that is padded beside a longer one is read as it is alone.

    Not so where a model has no use for a mask (recurrent states), or counts positions from the padding on. One row of a
    few tokens tells: alone, beside a longer one, and there with something else as padding. That last comparison does
    not suffer from rounding, since a mask takes out all of it.

    Args:
        read: logits `[rows, ..., vocabulary]` of rows, padded with the token it is given.
        rows: all that will be read.
        pad: the padding token.
        dtype: what is computed in.
    """
    short, long = min(rows, key=len), max(rows, key=len)
    if len(short) == len(long):
        return True
    short = list(short[-_SHORT:])
    long = list(long[: len(short) + _PADDED])
    other = next((token for token in long if token != pad), pad)
    alone = read([short], pad)[0]
    try:
        beside, filled = (read([short, long], token)[0] for token in (pad, other))
    except (ScaloraError, RuntimeError, ValueError, TypeError, LookupError, NotImplementedError):
        return False  # alone it could be read
    rounding = 2e-3 if dtype == torch.float32 else 5e-2
    return distance(beside, filled) < _SAME and distance(alone, beside) < rounding


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of the spread over the vocabulary."""
    if first.shape != second.shape:
        return float("inf")
    first, second = first.float(), second.float()
    return ((first - second).square().mean().sqrt() / first.std(-1).mean()).item()
