"""One trial in its own process: so that memory is its own, and a crash is only its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..common.errors import ScaloraError
from ..runs.recipe import Recipe, parse_recipe
from .plan import Comparison, Trial

if TYPE_CHECKING:
    from ..runs.giving_up import Bar

# What is kept of a run's metrics: what the report shows.
KEPT = (
    "split", "after", "primary", "higher_is_better", "steps", "train_seconds", "seconds_per_step", "waited_share",
    "peak_memory_bytes", "held_bytes",
    "trainable_parameters", "parameters", "adapter_bytes", "rank", "ranks", "environment",
)  # fmt: skip


def run_trial(
    comparison: Comparison,
    trial: Trial,
    heartbeat: Callable[[], None],
    every: float,
    inputs: Any = None,
    bars: Sequence[Bar] = (),
) -> dict[str, Any]:
    """Train and score one trial in a process of its own; its result, or ``{"error": reason}``.

    `heartbeat` is called `every` so many seconds while it runs. `inputs` are digests of what it must read, if known.
    A trial that is behind one of the `bars` ends there, with ``{"given_up": {"step", "of", "loss", "bar"}, "losses"}``.
    """
    with _temporary_folder() as folder:
        final = trial.stage == "final"
        order = {
            "recipe": comparison.trial_recipe(trial, str(folder / "run")).model_dump(mode="json"),
            "split": "test" if final else "validation",
            "ranks": final and comparison.ranks,  # the report shows them at the chosen rates only
            "inputs": inputs,
            "bars": bars,
        }
        return _run(folder, order, heartbeat, every)


def check_recipe(recipe: Recipe) -> tuple[list[str], dict[str, Any]]:
    """Load what a recipe names, in a process of its own, so that this one does not keep it.

    Lines about its data, and digests of all that is read (:class:`~scalora.runs.inputs.Inputs`, encoded).

    Raises:
        ScaloraError: something would fail in every trial alike; the message names it.
    """
    with _temporary_folder() as folder:
        content = recipe.model_dump(mode="json") | {"output": str(folder / "run")}
        answer = _run(folder, {"recipe": content}, lambda: None, 60.0)
    if "error" in answer:
        raise ScaloraError(answer["error"])
    return answer["notes"], answer["inputs"]


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="scalora-trial-") as folder:
        yield Path(folder)


def _run(folder: Path, order: dict[str, Any], heartbeat: Callable[[], None], every: float) -> dict[str, Any]:
    """The answer of a process to an order."""
    (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
    process = _processes().Process(target=_main, args=(folder,))
    process.start()
    try:
        while process.exitcode is None:
            process.join(every)
            heartbeat()
    except BaseException:  # Ctrl-C: do not leave it running
        process.kill()
        process.join()
        raise
    answer = folder / "answer.json"
    if not answer.exists():
        said = folder / "stderr"
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines() if said.exists() else []
        return {"error": f"the process ended with {process.exitcode}: {lines[-1] if lines else 'no message'}"}
    return json.loads(answer.read_text(encoding="utf-8"))


def _processes() -> Any:
    """Where there is a fork server, trials fork from a process that has imported everything: seconds saved on each."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scalora.runs.training"])
    return context


def _main(folder: Path) -> None:
    """Inside the process: run ``order.json``, leave ``answer.json``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tempfile.tempdir = str(folder)  # what a trial that is killed leaves there goes with its folder
    try:
        with (folder / "stderr").open("w") as said:
            os.dup2(said.fileno(), sys.stderr.fileno())
    except FileNotFoundError:  # whoever began this process was interrupted before it knew of it
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    from ..common.quiet import quiet

    quiet()
    order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    try:
        answer = _follow(parse_recipe(order.pop("recipe")), **order)
    except ScaloraError as error:
        answer = {"error": str(error)}
    (folder / "answer.tmp").write_text(json.dumps(answer), encoding="utf-8")
    (folder / "answer.tmp").rename(folder / "answer.json")


def _follow(
    recipe: Recipe,
    split: Literal["validation", "test"] | None = None,
    ranks: bool = False,
    inputs: Any = None,
    bars: Sequence[Sequence[float]] = (),
) -> dict[str, Any]:
    """Train and score on a split; without one only load."""
    from ..runs.giving_up import Bar, GivenUp, GiveUp
    from ..runs.inputs import Inputs
    from ..runs.loading import check
    from ..runs.training import Watcher, train

    if split is None:
        loaded = check(recipe)
        return {"notes": loaded.task.notes, "inputs": Inputs.of(loaded).encode()}
    watcher = Watcher()
    watcher.callbacks = (GiveUp([Bar(*bar) for bar in bars]),)
    try:
        metrics = train(recipe, split=split, baseline=False, ranks=ranks, watcher=watcher, expected=inputs).metrics
    except GivenUp as end:
        return {"given_up": {key: getattr(end, key) for key in ("step", "of", "loss", "bar")}, "losses": end.losses}
    losses = [[entry["step"], entry["loss"]] for entry in metrics["log"] if "loss" in entry]
    return {key: metrics[key] for key in KEPT} | {"losses": losses}


def _end_with_parent() -> None:
    """A trial whose worker was killed has nobody to tell."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
