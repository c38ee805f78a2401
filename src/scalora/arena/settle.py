"""One precision for all trials of a comparison, whichever machine takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.disk_layout import RESULTS
from ..runs.precision import PrecisionChoice, decide
from ..runs.recipe import parse_recipe
from ..runs.stored import of_today
from .plan import Comparison
from .results import read_results
from .storage import Storage, has_study, noted, open_study


def settle_precision(
    comparison: Comparison, folder: Path, storage: Storage | None = None
) -> tuple[Comparison, PrecisionChoice]:
    """The comparison with `precision: auto` decided, and why: as is recorded where it lies, else as suits this device.

    A comparison begun in bf16 thus goes on in bf16 on a machine that would choose float32. An order that contradicts
    what is recorded is left to :class:`~scalora.arena.queue.TrialQueue`, which refuses it.
    """
    recipe, recorded = comparison.recipe, None
    if recipe.precision == "auto" and (content := _recorded_recipe(folder, storage)) is not None:
        stored = parse_recipe(of_today(content), str(folder)).precision
        recorded = None if stored == "auto" else stored
    choice = decide(recipe.precision, recipe.training, recorded)
    return replace(comparison, recipe=recipe.model_copy(update={"precision": choice.precision})), choice


def _recorded_recipe(folder: Path, storage: Storage | None) -> dict[str, Any] | None:
    """The recipe of the comparison that was begun, from its queue or else its results; nothing is written."""
    if has_study(folder, storage):
        recipe = noted(open_study(folder, storage)[0], "recipe")
        if recipe is not None:
            return recipe
    if (folder / RESULTS).exists():
        return read_results(folder).get("recipe")
    return None
