"""A worker's road through a comparison: tune, choose_setting, run the final seeds, write the report as results come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..common.disk_layout import QUEUE, REPORT, RESULTS, UNSENT
from ..common.environment import environment, git_revision
from ..common.errors import ScaloraError
from ..common.files import check_writable
from ..runs.inputs import Inputs
from .confirming import confirmation
from .contender import Contender
from .extending import extension
from .liveness import HEARTBEAT
from .plan import Comparison, Trial
from .progress import in_minutes, progress_table, seconds_left
from .pruning import bars
from .queue import TrialQueue, ends_to_repeat
from .report import write_report
from .results import ComparisonRecord, write_comparison
from .statistics import Results, chosen_settings, in_order
from .storage import Storage, has_study
from .table import TextTable
from .trial import check_recipe, run_trial

Log = Callable[[str], None]
Show = Callable[[TextTable], None]


class Policy(NamedTuple):
    """How a comparison is worked on.

    ``retry``: failed trials run again. ``prune``: tuning trials that are far behind are given up
    (:mod:`~scalora.arena.pruning`); without it those that were are run. ``extend``: so many rates beyond either end of
    the grid are for a method that chose the last one. ``confirm``: on so many further tuning seeds the settings in
    front run again (:mod:`~scalora.arena.confirming`).
    """

    retry: bool = False
    prune: bool = False
    extend: int = 0
    confirm: int = 0


_PLAIN = Policy()
_POLL = 5.0  # seconds between looks at what other workers do
_REPORT = 30.0  # seconds at least between one report and the next while trials run


def run_comparison(
    comparison: Comparison,
    folder: Path,
    *,
    command: str,
    policy: Policy = _PLAIN,
    log: Log = print,
    show: Show = lambda table: None,
    inputs: Any = None,
    storage: Storage | None = None,
) -> ComparisonRecord:
    """Run what is missing of a comparison in ``folder``; what its results.json holds then.

    Several workers may run this on one folder at once, or on one `storage`, each machine with a folder of its own.
    results.json and report.html are rewritten as results come, and at the end, whatever ends it. Where only
    results.json is there, as in a clone, the queue begins with its trials.

    Args:
        comparison: who competes on what.
        folder: trials.sqlite3, results.json and report.html lie here.
        command: how it was called, for the record.
        policy: what else is run, and what is not.
        log: takes lines on progress.
        show: takes a table of what is done, whenever there is something new.
        inputs: what :func:`check_comparison` returned; a trial that would read anything else fails.
        storage: the database that holds the trials instead of the folder.

    Raises:
        ScaloraError: the folder holds a comparison of another recipe, every trial failed, or the database stays away.
    """
    queue = TrialQueue(folder, comparison, storage, log)
    if inputs is not None:
        queue.keep_inputs(inputs)
        _refuse_other(inputs, queue)
    try:
        _work(queue, comparison, folder, command, policy, log, show)
    except BaseException:
        queue.patience = 0.0
        queue.give_back()
        raise
    finally:
        record = _write(queue, comparison, folder, command)
    for contender in comparison.contenders:
        if contender not in record.chosen:
            log(f"{contender}: every tuning trial failed, so it takes no part in the final")
    _log_failures(record.results, folder, log)
    return record


def _log_failures(results: Results, folder: Path, log: Log) -> None:
    """Say how many trials failed; raises ScaloraError where none came through."""
    failed = [result["error"] for _, result in in_order(results) if "error" in result]
    if len(failed) == len(results):
        raise ScaloraError(
            f"every trial failed, the first with: {failed[0]}; mend it and add --retry to the same command (all: "
            f"{folder / 'results.json'})"
        )
    if failed:
        log(f"{len(failed)} of {len(results)} trials failed (--retry runs them again): {folder / 'results.json'}")


def refuse_strangers(folder: Path) -> None:
    """Refuse a folder that holds other things and no comparison; raises ScaloraError."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    ours = (QUEUE, RESULTS, REPORT, f".{RESULTS}", f".{REPORT}", UNSENT.partition("{")[0])
    strange = sorted(name for name in names if not name.startswith(ours))
    if strange and names.isdisjoint((QUEUE, RESULTS)):
        raise ScaloraError(
            f"--output is {str(folder)!r}, which is not empty and holds no comparison ({', '.join(strange[:3])}): "
            "choose another"
        )


def check_comparison(
    comparison: Comparison,
    folder: Path,
    *,
    policy: Policy = _PLAIN,
    log: Log = print,
    storage: Storage | None = None,
) -> Any:
    """Before any trial, and before anything is written: load what the recipe names, if a trial is still to run.

    `log` takes what is worth reading about the data. Digests of what is read; None where no trial is still to run.

    Raises:
        ScaloraError: every trial would fail alike, the folder takes no writing, or its trials read other data, another
            tokenizer or another base model; the message says which.
    """
    check_writable(folder, "--output")
    queue, results = None, {}
    if has_study(folder, storage) or (folder / RESULTS).exists():
        queue = TrialQueue(folder, comparison, storage, log)
        results = queue.results()
        wanted = _all(_stages(comparison, results, policy))
        again = ends_to_repeat(policy.retry, policy.prune)
        if all(t in results and again.isdisjoint(results[t]) for t in wanted):
            return None  # a report can be drawn anew where there is neither data nor model
    notes, inputs = check_recipe(comparison.recipe)
    for note in notes:
        log(note)
    if queue is not None and not _refuse_other(inputs, queue) and results:
        log(
            f"{queue.place} does not say what it began with: whether data, tokenizer and base model are the same is "
            "unknown"
        )
    return inputs


def _refuse_other(inputs: Any, queue: TrialQueue) -> bool:
    """Whether a comparison says what it began with; raises ScaloraError where that was something else."""
    if (begun := queue.inputs) is None:
        return False
    way_out = f"put back what it began with, or choose another {queue.option}"
    Inputs(**inputs).refuse_other(begun, f"the comparison in {queue.place}", way_out)
    return True


def _write(queue: TrialQueue, comparison: Comparison, folder: Path, command: str) -> ComparisonRecord:
    """Write results.json and report.html from what is there; the former's content."""
    record = ComparisonRecord(comparison, queue.results(), command, git_revision(), environment(), queue.inputs)
    write_comparison(record, folder)
    write_report(record, folder / REPORT)
    return record


def _work(
    queue: TrialQueue, comparison: Comparison, folder: Path, command: str, policy: Policy, log: Log, show: Show
) -> None:
    """Take trials until all have a result, contender after contender; final runs wait for their own tuning only."""
    offered, written, revision = set[Trial](), 0.0, git_revision()
    while True:
        results = queue.results()
        stages = _stages(comparison, results, policy)
        show(progress_table(comparison, stages, results))
        settled = {"after", "given_up"} if policy.prune else {"after"}
        wanted = [each for each in _all(stages) if settled.isdisjoint(results.get(each, ()))]
        trial = None
        # The next contender's are put there when nothing of this one's waits; at fixed rates all go seed by seed.
        by_seed = None if comparison.fixed is None else comparison.final(chosen_settings(results, comparison))
        for trials in stages.values() if by_seed is None else [by_seed]:
            fresh = [each for each in trials if each not in offered]
            queue.enqueue(fresh, retry=policy.retry, prune=policy.prune)
            offered.update(fresh)
            if (trial := queue.take(wanted)) is not None:
                break
        results = queue.results()
        if trial is None:
            if all(each in results for each in _all(_stages(comparison, results, policy))):
                return
            queue.enqueue(wanted)  # those whose worker died
            time.sleep(_POLL)
            continue
        started, alive = time.perf_counter(), partial(queue.heartbeat, trial)
        ahead = bars(comparison, results, trial) if policy.prune else []
        result = run_trial(comparison, trial, alive, HEARTBEAT, queue.inputs, ahead) | {"git_revision": revision}
        seconds = time.perf_counter() - started
        queue.finish(trial, result | {"wall_seconds": seconds})
        log(_line(queue, comparison, policy, trial, result, seconds))
        if time.monotonic() > written + _REPORT:
            _write(queue, comparison, folder, command)
            written = time.monotonic()


def _line(
    queue: TrialQueue, comparison: Comparison, policy: Policy, trial: Trial, result: dict[str, Any], seconds: float
) -> str:
    """What a trial has come to, how many are done, and how long the rest will take."""
    results = queue.results()
    stages = _stages(comparison, results, policy)
    tuning = sum(each.stage == "tune" for each in _all(stages))
    planned = tuning + len(comparison.contenders) * len(comparison.seeds)
    done = sum(each in results for each in _all(stages))
    left = seconds_left(comparison, stages, results, queue.workers())
    rest = f"; about {in_minutes(left)} left" if left else ""
    label = f"[{done}/{planned}] {trial.stage} {trial.contender} lr {trial.lr:g} seed {trial.seed}"
    return f"{label}: {_outcome(result)} ({seconds:.0f} s{rest})"


def _stages(comparison: Comparison, results: Results, policy: Policy) -> dict[Contender, list[Trial]]:
    """All trials known to be needed, by contender: of the grid, beyond it, again, and final ones after its tuning."""
    tuning = [*comparison.tuning(), *extension(comparison, results, policy.extend)]
    tuning += confirmation(comparison, results, tuning, policy.confirm)
    chosen, stages, seen = chosen_settings(results, comparison), {}, set[Trial]()
    for contender in comparison.everyone:
        own = [trial for trial in tuning if trial.contender in comparison.settings[contender]]
        if contender in chosen and contender in comparison.contenders and all(trial in results for trial in own):
            own += comparison.final({contender: chosen[contender]})
        stages[contender] = [trial for trial in dict.fromkeys(own) if trial not in seen]
        seen.update(own)
    return stages


def _all(stages: Mapping[Contender, Sequence[Trial]]) -> list[Trial]:
    return [trial for trials in stages.values() for trial in trials]


def _outcome(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    if "given_up" in result:
        end = result["given_up"]
        return f"given up at step {end['step']} of {end['of']}: training loss {end['loss']:.4f} above {end['bar']:.4f}"
    return ", ".join(f"{name} {value:.4f}" for name, value in result["after"].items())
