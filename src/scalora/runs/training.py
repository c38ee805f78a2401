"""One run of a recipe, from data to a scored, saved adapter. Reads from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..common import processes
from ..common.disk_layout import ADAPTER, METRICS
from ..common.environment import environment, peak_memory
from ..common.files import expand_user, write_json
from ..engine.trainer import ScaLoraCallback
from ..methods import Adapted, build_method
from ..models.origin import origin, random_modules
from ..models.packed import entries
from ..tasks import Score, Split
from .callbacks import RankTracker, SealCheckpoints, StableOrder, StepTimer, StopOnNonFinite, StopOnSignal, rank_by_kind
from .evaluation import RecipeTrainer, check_metric
from .folder import last_checkpoint, saved_precision, writing
from .held import HeldBytes, weight_bytes
from .inputs import Inputs
from .launching import is_sharding, refuse_unsupported, shard
from .loading import Loaded, load_inputs, made_ready, refuse_no_step, setting_up
from .plots import draw_curves, draw_rank
from .precision import AUTOCAST, PrecisionChoice, decide
from .recipe import Recipe
from .shared_folder import SharedFolder


class Interrupted(Exception):
    """The run was stopped from outside; its last checkpoint, and what it saved after the last step, if there is one."""

    def __init__(self, checkpoint: Path | None, trained: Path | None = None) -> None:
        super().__init__(str(trained or checkpoint))
        self.checkpoint, self.trained = checkpoint, trained


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind, in memory; the same is on disk in ``folder``."""

    folder: Path
    metrics: dict[str, Any]
    before: Score | None
    after: Score
    loading: list[str]  # lines of Python that load the result


class Watcher:
    """What a run tells while it goes on; the command line draws it, others may ignore it."""

    callbacks: tuple[TrainerCallback, ...] = ()

    def phase(self, text: str) -> None:
        """A new phase begins."""

    def say(self, text: str) -> None:
        """A line that is worth reading; may come from another thread."""

    def progress(self, done: int, total: int) -> None:
        """Sequences scored so far."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    split: Split = "test",
    baseline: bool = True,
    ranks: bool = True,
    watcher: Watcher | None = None,
    expected: Any = None,
) -> RunResult:
    """Run a recipe and score it on ``split``, with ``baseline`` before training too (and on any validation data after).

    Without ``ranks`` the rank of the update is not measured: dense updates need an SVD of every layer, ten times a run.

    ``expected`` are digests of what must be read (:class:`~scalora.runs.inputs.Inputs`, encoded): other data, another
    tokenizer or another base model are refused.

    Where torchrun or accelerate has started several processes, each calls this, and they are one run: the batch of a
    step is theirs together, scoring is shared out, and the first one writes and tells.

    Leaves in ``recipe.output``: recipe.yaml (resolved), inputs.json, adapter/, checkpoints/, metrics.json, curves.png,
    rank.png; or nothing at all where the run fails before its first checkpoint.

    Raises:
        ScaloraError: bad input, with one clear message.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; the checkpoint to resume from is named.
    """
    with processes.one_run(), processes.ending_together():
        recorded = saved_precision(expand_user(recipe.output)) if resume else None
        choice = processes.from_first(lambda: decide(recipe.precision, recipe.training, recorded))
        recipe = recipe.model_copy(update={"precision": choice.precision})
        refuse_unsupported(recipe)
        run_folder = SharedFolder(recipe, resume=resume, overwrite=overwrite)
        told = watcher if watcher is not None and processes.is_first() else Watcher()
        try:
            return _train(recipe, choice, run_folder, split, baseline, ranks, told, expected)
        except KeyboardInterrupt:
            raise Interrupted(last_checkpoint(run_folder.path), run_folder.trained) from None
        finally:
            run_folder.release()


def _train(
    recipe: Recipe,
    choice: PrecisionChoice,
    run_folder: SharedFolder,
    split: Split,
    baseline: bool,
    ranks: bool,
    watcher: Watcher,
    expected: Any,
) -> RunResult:
    folder, method = run_folder.path, build_method(recipe.method)
    if run_folder.checkpoint:
        method.check_resuming()

    watcher.say(f"precision: {choice}")
    watcher.phase("loading data and model")
    loaded = load_inputs(recipe)
    for note in loaded.task.notes:
        watcher.say(note)
    inputs = Inputs.of(loaded)
    if expected is not None:
        inputs.refuse_other(expected, "the comparison", "put back what it began with")
    if said := run_folder.settle(inputs):
        watcher.say(said)
    if random := random_modules(loaded.model):
        watcher.say(f"started at random, trained and saved as a whole: {', '.join(random)}")
    if overrides := origin(loaded.model).overrides:
        watcher.say(f"config: what is saved is for the base with {dict(overrides)}, and for no other")
    if loaded.quantization != "none":
        watcher.say(f"quantization: an adapter is for the base in {loaded.quantization}, and for no other")
    loaded = made_ready(loaded, AUTOCAST[choice.precision])
    task, arguments, model, dataset = loaded.task, loaded.arguments, loaded.model, loaded.dataset

    def score(split: Split) -> Score:
        return task.score(
            adapted.model, loaded.tokenizer, split, batch_size=recipe.score_batch_size,
            autocast=AUTOCAST[choice.precision], progress=watcher.progress,
        )  # fmt: skip

    method.check(arguments)
    set_seed(arguments.seed)  # adapters start alike, whatever was drawn before
    base_bytes = weight_bytes(model)
    adapted = method.adapt(model, task.head)
    held = HeldBytes(adapted, base_bytes)
    before = None
    if baseline:
        watcher.phase("scoring before training")
        before = score(split)
        check_metric((arguments.metric_for_best_model or "loss").removeprefix("eval_"), before.metrics)

    watcher.phase(f"training from {run_folder.checkpoint.name}" if run_folder.checkpoint else "training")
    if ranks and adapted.remember:
        adapted.remember()
    timer = StepTimer()
    stop = StopOnSignal(watcher.say, timer)
    tracker = [RankTracker(adapted.spectra)] if ranks else []
    sealed = SealCheckpoints(arguments.save_total_limit)
    arguments.save_total_limit = None  # Trainer would delete an older checkpoint before the new one is complete
    watching = [StableOrder(), timer, *tracker, held, stop, *watcher.callbacks, StopOnNonFinite(), sealed]
    started = time.perf_counter()
    try:
        with writing(folder), setting_up(timer):
            trainer = _trainer(adapted, arguments, loaded, watching, lambda: score("validation").metrics)
            shard(trainer)
            if recipe.head_learning_rate is not None:
                set_head_rate(trainer.create_optimizer(), adapted.model, loaded.heads, recipe.head_learning_rate)
            trainer.train(resume_from_checkpoint=str(run_folder.checkpoint) if run_folder.checkpoint else None)
    finally:
        stop.restore()
    if stop.received is not None:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    if arguments.load_best_model_at_end and (best := trainer.state.best_model_checkpoint):
        watcher.say(f"best: {Path(best).name}, {arguments.metric_for_best_model} {trainer.state.best_metric:.4f}")

    def save() -> list[str]:
        watcher.phase("saving")
        with writing(folder):
            # What is sharded is gathered by all, and written by the first.
            write = partial(adapted.save, folder / ADAPTER)
            lines = write() if is_sharding() else processes.from_first(write)
        run_folder.trained = folder / ADAPTER
        return lines

    lines = None if adapted.used_up else save()  # before anything else may fail or be stopped
    watcher.phase("scoring after training")
    after = score(split)
    validation = score("validation").metrics if baseline and split == "test" and task.splits.validation else None
    trainable, total = _count(adapted.model)
    rank = rank_by_kind(adapted.spectra()) if ranks else None
    lines = save() if lines is None else lines
    loading = ([] if task.tokens else ["import scalora.models.digits"]) + lines
    log = [entry for entry in trainer.state.log_history if "rank" not in entry]
    metrics = {
        "split": split,
        "precision": choice._asdict(),
        "processes": processes.count(),
        "before": before.metrics if before else None,
        "after": after.metrics,
        "validation": validation,
        "primary": after.primary,
        "higher_is_better": after.higher_is_better,
        "steps": trainer.state.global_step,
        "train_seconds": seconds,
        "steps_seconds": sum(timer.seconds),  # of these, without data, measurements, evaluation and checkpoints
        "seconds_per_step": timer.median(),
        "waited_share": timer.waited_share(),
        "peak_memory_bytes": peak_memory(),
        "held_bytes": held.found,
        "trainable_parameters": trainable,
        "parameters": total,
        "adapter_bytes": sum(p.stat().st_size for p in (folder / ADAPTER).rglob("*") if p.is_file()),
        "rank": rank,
        "ranks": RankTracker.history(trainer.state),
        "truncated": {"train": dataset.truncated, split: after.truncated},
        "events": _events(adapted),
        "log": log,
        "base_fingerprint": inputs.base_model,
        "inputs": inputs.encode(),
        "class_names": task.class_names,
        "environment": environment(),
    }
    with writing(folder):
        processes.from_first(lambda: _leave(folder, metrics, recipe.method.rank))
    return RunResult(folder, metrics, before, after, loading)


def _leave(folder: Path, metrics: dict[str, Any], r: int) -> None:
    draw_curves(metrics["log"], folder / "curves.png")
    draw_rank(metrics["ranks"], metrics["events"], r, folder / "rank.png")
    write_json(folder / METRICS, metrics)  # last: its presence says that the run is complete


def _trainer(
    adapted: Adapted,
    arguments: TrainingArguments,
    loaded: Loaded,
    callbacks: list[TrainerCallback],
    metrics: Callable[[], dict[str, float]],
) -> Trainer:
    rows: Any = adapted.split_train(loaded.dataset) if adapted.split_train else loaded.dataset
    refuse_no_step(arguments, len(rows))
    trainer = RecipeTrainer(
        adapted.model,
        arguments,
        train_dataset=rows,
        eval_dataset=loaded.validation,
        data_collator=loaded.collator,
        callbacks=[*adapted.callbacks, *callbacks],
        optimizers=(adapted.optimizer(arguments) if adapted.optimizer else None, None),
        metrics=metrics,
    )
    trainer.remove_callback(PrinterCallback)  # the watcher tells what is logged
    # First of all, so that trackers (report_to) see its figures too.
    trainer.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, ScaLoraCallback))
    return trainer


def _count(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all of them (accumulated ones included)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(map(entries, model.parameters()))


def _events(adapted: Adapted) -> list[dict[str, Any]]:
    handles = [c.handle for c in adapted.callbacks if isinstance(c, ScaLoraCallback) and c.handle]
    return [vars(event) for handle in handles for event in handle.stats]


def set_head_rate(optimizer: Optimizer, model: nn.Module, heads: Collection[str], lr: float) -> None:
    """Give the trained parameters below ``heads`` parameter groups of their own, with this learning rate.

    Args:
        optimizer: one that has not taken a step; its groups are otherwise kept.
        model: whose parameters it holds.
        heads: names of the head's modules in the plain model; wrappers may have put names before and behind them.
        lr: the rate before any schedule, which must be built after this.
    """
    within = {id(p) for name, p in model.named_parameters() if any(f".{head}." in f".{name}" for head in heads)}
    for group in list(optimizer.param_groups):
        head = [p for p in group["params"] if id(p) in within]
        if head:
            group["params"] = [p for p in group["params"] if id(p) not in within]
            optimizer.add_param_group({**group, "params": head, "lr": lr})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
