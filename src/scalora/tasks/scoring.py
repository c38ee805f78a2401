"""How held-out rows go through a model: without gradients, in batches of like length, shared out over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from ..common import processes

PerRow = TypeVar("PerRow")
Progress = Callable[[int, int], None]
"""Called after each batch with (sequences done, sequences in all)."""


@contextmanager
def evaluating(model: Any, autocast: torch.dtype | None) -> Iterator[torch.device]:
    """Without gradients and dropout; yields the model's device and restores training mode at the end."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast) if autocast else nullcontext():
            yield device
    finally:
        model.train(was_training)


_MAX_KEPT = 2048  # positions whose logits one batch may hold: 0.4 GB for a vocabulary of 50,000 in float32


def batches(lengths: Sequence[int], kept: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: little padding, and memory runs out early or never.

    `kept` is the number of positions of each sequence that need logits; long ones make a batch smaller.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        widest = max(kept[i] for i in (*batch, index))
        if batch and (len(batch) == batch_size or widest * (len(batch) + 1) > _MAX_KEPT):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def consecutive(rows: int, batch_size: int) -> list[list[int]]:
    """Indices in batches as they come, for rows that are all of one size."""
    return [list(range(start, min(start + batch_size, rows))) for start in range(0, rows, batch_size)]


def by_row(
    parts: Sequence[list[int]], work: Callable[[list[int]], Sequence[PerRow]], progress: Progress | None
) -> list[PerRow]:
    """What ``work`` makes of each row, in the rows' order; on several processes each takes some of the batches.

    Args:
        parts: batches of the rows' numbers, each number in one of them.
        work: gives one thing for each row of a batch, on the CPU where there are several processes.
        progress: told after each batch.
    """
    total, done = sum(map(len, parts)), 0

    def told(batch: list[int]) -> Sequence[PerRow]:
        nonlocal done
        made = work(batch)
        done = min(done + processes.count() * len(batch), total)
        if progress:
            progress(done, total)
        return made

    found: dict[int, PerRow] = {}
    for batch, made in zip(parts, processes.shared_out(parts, told), strict=True):
        found |= zip(batch, made, strict=True)
    return [found[row] for row in range(total)]
