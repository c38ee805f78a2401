"""The score of what lies in a folder, on the rows of its recipe or on others; nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..common.errors import ScaloraError
from ..models.heads import HEADS
from ..models.packed import refuse_rows_of_odd_length
from ..tasks import Score, Split, Task, build_task
from ..tasks.positions import check_positions, check_vocabulary
from .export.artefact import Artefact, find_artefact
from .export.base_model import Base
from .export.restored import load_delta
from .export.restored_peft import restore
from .precision import AUTOCAST, PrecisionChoice, decide
from .recipe import Recipe, load_recipe, parse_recipe, put_override
from .training import Watcher

SETTABLE = ("task", "precision", "score_batch_size")  # all else is of training, and has been decided


@dataclass(frozen=True)
class Evaluation:
    """A score, and of what it is."""

    folder: Path  # where the weights lie
    split: Split
    rows: int
    precision: PrecisionChoice
    score: Score
    recorded: dict[str, float] | None  # what the run itself found on these rows, where it tells


def evaluate_folder(
    path: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    split: str | None = None,
    base: str | None = None,
    watcher: Watcher | None = None,
) -> Evaluation:
    """Score a run, a checkpoint, an adapter, a whole model or an export on held-out rows.

    Args:
        path: the folder; of a run its result, or its newest checkpoint where it has none yet.
        recipe: the file whose task, precision and batch size count; None: those of the run.
        overrides: ``key.subkey=value`` each, of these.
        split: "train", "validation" or "test"; None: test rows, or validation rows where there are no others.
        base: where the base model lies, if not where the run found it.
        watcher: told what goes on.

    Raises:
        ScaloraError: bad input; no recipe says what to score; or the task asks for another kind of model.
    """
    told = watcher or Watcher()
    if split is not None and split not in get_args(Split):
        raise ScaloraError(f"split is {split!r}: choose one of {', '.join(get_args(Split))}")
    artefact = find_artefact(path)
    asked = _recipe(artefact, recipe, overrides)
    task, choice = build_task(asked.task), decide(asked.precision, asked.training)
    chosen = _split(task, split)
    told.say(f"precision: {choice}")
    told.phase(f"loading {artefact.folder}")
    source, model = _model(artefact, base)
    _check_fits(artefact, source, task)
    tokenizer = source.padded_tokenizer if task.tokens else None
    dataset = task.train_dataset(tokenizer, chosen)
    if task.tokens:
        check_vocabulary(model, tokenizer, {chosen: dataset})
    check_positions(model, {chosen: dataset}, getattr(task.spec, "max_length", None), task.max_written)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked.training.get("use_cpu") or device is None:
        device = torch.device("cpu")
        refuse_rows_of_odd_length(model)
    autocast = AUTOCAST[choice.precision]
    if task.compares:
        untouched = Base(artefact, base).load().to(device)
        task.refer(untouched, tokenizer, {chosen: dataset}, asked.score_batch_size, autocast)
        del untouched
    model.to(device)
    task.equip(model)
    for note in task.notes:
        told.say(note)
    told.phase(f"scoring {chosen} rows")
    score = task.score(
        model, tokenizer, chosen, batch_size=asked.score_batch_size, autocast=autocast, progress=told.progress
    )
    theirs = recipe is None and not any(each.startswith("task") for each in overrides)
    found = artefact.scores if theirs else None
    recorded = found["after"] if found is not None and found["split"] == chosen else None
    return Evaluation(artefact.folder, chosen, len(task.rows(chosen)), choice, score, recorded)


def _recipe(artefact: Artefact, recipe: str | Path | None, overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        if override.split("=")[0].split(".")[0] not in SETTABLE:
            raise ScaloraError(f"--set {override!r}: the run is over; what can still be set is {', '.join(SETTABLE)}")
    if recipe is not None:
        return load_recipe(recipe, overrides)
    if artefact.made_by is None:
        raise ScaloraError(
            f"{str(artefact.folder)!r} belongs to no run, so that nothing says what to score it on: name a recipe with "
            "--recipe, whose task counts"
        )
    content = copy.deepcopy(artefact.made_by)
    for split in get_args(Split):
        if any(override.startswith(f"task.data.{split}=") for override in overrides):
            content["task"]["data"].pop(f"{split}_size", None)  # of the former rows
    for override in overrides:
        put_override(content, override)
    return parse_recipe(content, "the run's recipe.yaml")


def _split(task: Task, asked: str | None) -> Split:
    there: list[Split] = [split for split in get_args(Split) if getattr(task.splits, split)]
    held_out: list[Split] = [split for split in get_args(Split)[::-1] if split in there and split != "train"]
    if asked is None and held_out:
        return held_out[0]
    for split in there:
        if split == asked:
            return split
    wanted = asked or "test"
    raise ScaloraError(
        f"there are no {wanted} rows: name a source in task.data.{wanted} (--set), or choose a split of "
        f"{', '.join(there)}"
    )


def _model(artefact: Artefact, base: str | None) -> tuple[Base, Any]:
    """What was trained, in evaluation mode on the CPU, and where its tokenizer is from."""
    if artefact.kind == "model" and artefact.run is None:  # it needs no other model, and has its own tokenizer
        source = Base(replace(artefact, export=None), str(artefact.folder))
        return source, source.load()
    source = Base(artefact, base)
    if artefact.kind == "delta":
        return source, load_delta(artefact.folder, source)
    return source, restore(artefact, source).model


def _check_fits(artefact: Artefact, source: Base, task: Task) -> None:
    kind = task.kind()
    if task.head != source.head:
        raise ScaloraError(
            f"task.kind is {kind!r}, which is scored by a {task.head} model, but {str(artefact.folder)!r} is of "
            f"{source.head}: choose a recipe for such a model"
        )
    if not HEADS[task.head].labelled:
        return
    if task.num_labels != source.num_labels:
        raise ScaloraError(
            f"the task has {task.num_labels} labels, but {str(artefact.folder)!r} was trained on {source.num_labels}: "
            "choose the recipe that it was trained by, or set task.labels"
        )
    if None not in (names := [task.class_names, source.class_names]) and names[0] != names[1]:
        raise ScaloraError(
            f"the task's labels are {names[0]}, but {str(artefact.folder)!r} was trained on {names[1]}: choose the "
            "recipe that it was trained by, or set task.labels"
        )
