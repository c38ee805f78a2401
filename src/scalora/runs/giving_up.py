"""A run that ends early because others like it were far better at the same point."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from transformers import TrainerCallback


class Bar(NamedTuple):
    """The training loss that a run must have reached when a share of its steps is done."""

    share: float
    loss: float


class GivenUp(Exception):
    """Raised after the step at which a run was behind its bar; what it had logged until then comes with it."""

    def __init__(self, step: int, of: int, loss: float, bar: float, losses: list[list[float]]) -> None:
        super().__init__(f"given up at step {step} of {of}: training loss {loss:.4f} is above {bar:.4f}")
        self.step, self.of, self.loss, self.bar, self.losses = step, of, loss, bar, losses


class GiveUp(TrainerCallback):
    """Ends a run that is behind a bar, by raising :class:`GivenUp`."""

    def __init__(self, bars: Sequence[Bar]) -> None:
        self.bars = sorted(bars)

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # when the step before has been logged
        while self.bars and state.global_step >= self.bars[0].share * state.max_steps:
            share, bar = self.bars.pop(0)
            losses = [[float(entry["step"]), float(entry["loss"])] for entry in state.log_history if "loss" in entry]
            loss = level(losses, state.max_steps, share)
            if loss is not None and not loss <= bar:  # NaN is behind too
                raise GivenUp(state.global_step, state.max_steps, loss, bar, losses)


def level(losses: Sequence[Sequence[float]], steps: int, share: float) -> float | None:
    """Where the training loss stands after a share of the steps: the mean of what was logged in the quarter before.

    Args:
        losses: steps and what was logged there.
        steps: of the whole run.

    None where nothing was logged in that quarter.
    """
    until = share * steps
    recent = [loss for step, loss in losses if 0.75 * until < step <= until]
    return mean(recent) if recent else None
