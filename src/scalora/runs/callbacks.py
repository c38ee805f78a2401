"""What watches a run: the order of its data, time, rank of the update, health, checkpoints, and the wish to stop it."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from accelerate.data_loader import get_sampler
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints

from ..algebra.lowrank import numerical_rank
from ..common import processes
from ..common.environment import seconds_waited
from ..common.errors import ScaloraError
from ..common.files import seal
from ..common.stopping import let_go, stop, stop_signals
from ..layers.sharding import local_shard
from ..methods import Spectrum

POINTS = 10  # measurements of the rank over a run


class StableOrder(TrainerCallback):
    """Has batches that are grouped by length come in an order of the seed and the epoch alone.

    transformers takes it from the global random state, which depends on what a method has drawn before, and is not
    known to a run that is resumed in a later epoch. The first epoch's order is that of a plain Trainer, of one process:
    groups are of the batches of a step, which is that of all processes together.
    """

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        sampler = get_sampler(kwargs["train_dataloader"])
        if isinstance(sampler, LengthGroupedSampler):
            seed = args.seed if args.data_seed is None else args.data_seed
            sampler.batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            sampler.generator = torch.Generator().manual_seed(seed + 1_000_003 * int(state.epoch or 0))
            torch.empty((), dtype=torch.int64).random_(generator=sampler.generator)  # DataLoader's draw before


class StepTimer(TrainerCallback):
    """Times optimizer steps: forward, backward, update; neither data loading nor measurements."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = False  # the first step
        self._started = 0.0
        self._waited, self._waiting = 0.0, seconds_waited()  # for a core; seconds in steps, and those up to this one

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.began = True
        self._waiting = seconds_waited()
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        if self._waiting is not None:
            self._waited += (seconds_waited() or 0.0) - self._waiting

    def waited_share(self) -> float | None:
        """The share of the steps' time that waited for a core, others having it; None where that is not known."""
        total = sum(self.seconds)
        return self._waited / total if total and self._waiting is not None else None

    def median(self) -> float:
        """Median seconds of a step; 0 where none was taken."""
        return median(self.seconds) if self.seconds else 0.0

    def remaining(self) -> float | None:
        """Seconds until this step ends, by those before it; None in the first."""
        return max(0.0, self._started + self.median() - time.perf_counter()) if self.seconds else None


class RankTracker(TrainerCallback):
    """Measures the rank of the whole update of every layer, some ten times over a run."""

    def __init__(self, spectra: Callable[[], Iterator[tuple[str, Spectrum]]]) -> None:
        self.spectra = spectra

    def on_step_end(self, args, state, control, **kwargs) -> None:
        every = max(1, state.max_steps // POINTS)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            refuse_non_finite(args, state, kwargs["model"])  # it has no singular values
            # Among the logs, which a resumed run takes over.
            log: list[Any] = state.log_history
            log.append({"step": state.global_step, "rank": rank_by_kind(self.spectra())})

    @staticmethod
    def history(state: TrainerState) -> list[dict[str, Any]]:
        """``{"step", "mean", "kinds"}`` of each measurement, those before a resume included."""
        log: list[Any] = state.log_history
        return [{"step": entry["step"], **entry["rank"]} for entry in log if "rank" in entry]


def rank_by_kind(spectra: Iterator[tuple[str, Spectrum]]) -> dict[str, Any]:
    """Mean numerical rank per kind of layer (the last part of its name) and over all layers."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for name, (sigma, m, n) in spectra:
        ranks[name.rsplit(".", 1)[-1]].append(int(numerical_rank(sigma, m, n)))
    if not ranks:
        return {"mean": 0.0, "kinds": {}}
    return {
        "mean": mean(rank for group in ranks.values() for rank in group),
        "kinds": {kind: mean(group) for kind, group in ranks.items()},
    }


class StopOnNonFinite(TrainerCallback):
    """Stops a run whose parameters are no longer finite, before the next log or checkpoint.

    Raises:
        ScaloraError: they are not.
    """

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if control.should_log or control.should_save:  # each look waits for the device
            refuse_non_finite(args, state, kwargs["model"])


def refuse_non_finite(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Raise ScaloraError where what is trained is no longer finite. A collective."""
    mine = [local_shard(p.detach()) for p in model.parameters() if p.requires_grad]
    norms = torch._foreach_norm(mine)
    if processes.any_of(not torch.stack([norm.float() for norm in norms]).isfinite().all()):
        raise ScaloraError(
            f"the trained parameters are no longer finite at step {state.global_step}: training diverged; lower "
            f"training.learning_rate (it is {args.learning_rate:g}), lengthen training.warmup_steps, or check the "
            "data; earlier checkpoints are as they were"
        )


class SealCheckpoints(TrainerCallback):
    """Declares each checkpoint complete once everything is in it, and only then deletes older ones.

    It goes last of all callbacks. What is logged is cut off at each checkpoint, so that a run resumed there logs alike.
    """

    def __init__(self, keep: int | None) -> None:
        self.keep = keep  # checkpoints; None keeps all

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_log |= control.should_save

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs) -> None:
        processes.from_all(None)  # each process has written its part
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            seal(folder / f"checkpoint-{state.global_step}")
            rotate_checkpoints(str(folder), self.keep, state.best_model_checkpoint)


class StopOnSignal(TrainerCallback):
    """Ctrl-C, SIGTERM or SIGHUP: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    A thread says so: Python's own handler has to wait until torch returns, which may take a whole backward pass.
    """

    def __init__(self, say: Callable[[str], None], timer: StepTimer) -> None:
        self.received: signal.Signals | None = None
        self._say, self._timer = say, timer
        self._previous: dict[signal.Signals, Any] = {}
        self._wakeup: tuple[socket.socket, int] | None = None  # ours, and the descriptor that was set before

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._previous = {s: signal.getsignal(s) for s in stop_signals()}
        heard, ours = socket.socketpair()
        ours.setblocking(False)
        threading.Thread(target=self._answer, args=(heard, frozenset(self._previous)), daemon=True).start()
        self._wakeup = ours, signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        for number in self._previous:
            signal.signal(number, self._receive)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if processes.any_of(self.received is not None):  # all of them stop after the same step
            self.received = self.received or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._wakeup is not None:
            ours, before = self._wakeup
            signal.set_wakeup_fd(before)
            ours.close()  # which ends the thread
            self._wakeup = None

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            stop(number, frame)
        self.received = signal.Signals(number)

    def _answer(self, heard: socket.socket, numbers: frozenset[int]) -> None:
        """Runs in the thread: a byte is the number of a signal that came; answered late, after the end, it still is."""
        answered = False
        with heard:
            while byte := heard.recv(1):
                if byte[0] not in numbers:
                    continue
                let_go(byte[0])
                left = self._timer.remaining()
                when = "" if left is None else f", about {max(1, round(left))} s"
                self._say("stopping" if answered else f"stopping after this step{when}; Ctrl-C again stops at once")
                answered = True
