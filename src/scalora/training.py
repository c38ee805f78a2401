"""One run of a recipe, from data to a scored, saved adapter. Reads from top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from . import run_folder
from .callbacks import RankTracker, StepTimer, StopOnSignal, rank_by_kind
from .errors import ScaloraError
from .integrations.trainer import ScaLoraCallback
from .methods import Adapted, build_method
from .models import fingerprint, load_model
from .plots import draw_curves, draw_rank
from .provenance import environment, peak_memory
from .recipes import Recipe
from .tasks import Score, Split, build_task


class Interrupted(Exception):
    """The run was stopped from outside; its last checkpoint, if there is one."""

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


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

    def progress(self, done: int, total: int) -> None:
        """Sequences scored so far."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    split: Split = "test",
    baseline: bool = True,
    watcher: Watcher | None = None,
) -> RunResult:
    """Run a recipe and score it on ``split``, with ``baseline`` before training too (and on any validation data after).

    Leaves in ``recipe.output``: recipe.yaml (resolved), adapter/, checkpoints/, metrics.json, curves.png, rank.png; or
    nothing at all where the run fails before its first checkpoint.

    Raises:
        ScaloraError: bad input, with one clear message.
        Interrupted: Ctrl-C or SIGTERM; the checkpoint to resume from is named.
    """
    folder = run_folder.claim(recipe, resume=resume, overwrite=overwrite)
    try:
        return _train(recipe, folder, resume, split, baseline, watcher or Watcher())
    except KeyboardInterrupt:
        raise Interrupted(run_folder.last_checkpoint(folder)) from None
    finally:
        run_folder.release(folder, overwrite=overwrite)


def _train(recipe: Recipe, folder: Path, resume: bool, split: Split, baseline: bool, watcher: Watcher) -> RunResult:
    task, method = build_task(recipe.task), build_method(recipe.method)
    arguments = _arguments(recipe)

    watcher.phase("loading data and model")
    _ = task.splits
    set_seed(arguments.seed)  # a classification head starts at random
    model, tokenizer = load_model(
        recipe.model, head=task.head, num_labels=task.num_labels, dtype=recipe.dtype,
        config=recipe.config, attn_implementation=recipe.attn_implementation,
    )  # fmt: skip
    if task.tokens != (tokenizer is not None):
        reads, wants = ("tokens", "vectors") if tokenizer else ("vectors", "tokens")
        raise ScaloraError(f"model: {recipe.model!r} reads {reads}, but task.kind {recipe.task.kind!r} gives {wants}")
    base = fingerprint(model)
    dataset, collator = task.train_dataset(tokenizer), task.collator(tokenizer, model)
    model.to(arguments.device)

    def score(split: Split) -> Score:
        autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
        return task.score(
            adapted.model, tokenizer, split, batch_size=recipe.score_batch_size, autocast=autocast,
            progress=watcher.progress,
        )  # fmt: skip

    set_seed(arguments.seed)  # adapters start alike, whatever was drawn before
    adapted = method.adapt(model, task.head)
    before = None
    if baseline:
        watcher.phase("scoring before training")
        before = score(split)

    watcher.phase("training")
    timer, ranks, stop = StepTimer(), RankTracker(adapted.spectra), StopOnSignal()
    trainer = _trainer(adapted, arguments, dataset, collator, [timer, ranks, stop, *watcher.callbacks])
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(run_folder.last_checkpoint(folder)) if resume else None)
    finally:
        stop.restore()
    if stop.received is not None:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - started

    watcher.phase("scoring after training")
    after = score(split)
    validation = score("validation").metrics if baseline and split == "test" and task.splits.validation else None
    watcher.phase("saving")
    trainable, total = _count(adapted.model)
    rank = rank_by_kind(adapted.spectra())
    loading = ([] if task.tokens else ["import scalora.dense"]) + adapted.save(folder / "adapter")
    metrics = {
        "split": split,
        "before": before.metrics if before else None,
        "after": after.metrics,
        "validation": validation,
        "primary": after.primary,
        "higher_is_better": after.higher_is_better,
        "steps": trainer.state.global_step,
        "train_seconds": seconds,
        "seconds_per_step": timer.median(),
        "peak_memory_bytes": peak_memory(),
        "trainable_parameters": trainable,
        "parameters": total,
        "adapter_bytes": sum(p.stat().st_size for p in (folder / "adapter").rglob("*") if p.is_file()),
        "rank": rank,
        "ranks": ranks.history,
        "truncated": {"train": dataset.truncated, split: after.truncated},
        "events": _events(adapted),
        "log": trainer.state.log_history,
        "base_fingerprint": base,
        "environment": environment(),
    }
    draw_curves(trainer.state.log_history, folder / "curves.png")
    draw_rank(ranks.history, metrics["events"], recipe.method.rank, folder / "rank.png")
    run_folder.write_json(folder / run_folder.METRICS, metrics)  # last: its presence says that the run is complete
    return RunResult(folder, metrics, before, after, loading)


def _arguments(recipe: Recipe) -> TrainingArguments:
    output = Path(recipe.output).expanduser() / run_folder.CHECKPOINTS
    # Trainer allows bf16 on a CPU only where it is told that the CPU is meant.
    ours = {"disable_tqdm": True, "remove_unused_columns": False, "use_cpu": not torch.accelerator.is_available()}
    options = {**ours, **recipe.training}
    try:
        return TrainingArguments(output_dir=str(output), **options)
    except (TypeError, ValueError, ImportError) as error:
        raise ScaloraError(f"training: {' '.join(str(error).split())}") from error


def _trainer(
    adapted: Adapted, arguments: TrainingArguments, dataset: Any, collator: Any, callbacks: list[TrainerCallback]
) -> Trainer:
    optimizer = adapted.optimizer(arguments) if adapted.optimizer else None
    trainer = Trainer(
        adapted.model,  # pyright: ignore[reportArgumentType]
        arguments,
        train_dataset=adapted.split_train(dataset) if adapted.split_train else dataset,
        data_collator=collator,
        callbacks=[*adapted.callbacks, *callbacks],
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)  # the watcher tells what is logged
    # First of all, so that trackers (report_to) see its figures too.
    trainer.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, ScaLoraCallback))
    return trainer


def _count(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all of them (accumulated ones included)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def _events(adapted: Adapted) -> list[dict[str, Any]]:
    handles = [c.handle for c in adapted.callbacks if isinstance(c, ScaLoraCallback) and c.handle]
    return [vars(event) for handle in handles for event in handle.stats]
