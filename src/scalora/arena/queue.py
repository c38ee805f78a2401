"""Where trials wait, run and are kept: an optuna study on sqlite, shared by any number of workers."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError  # of optuna's storage

from ..common.disk_layout import QUEUE, RESULTS
from ..common.errors import ScaloraError
from ..runs.recipe import Recipe, parse_recipe, with_precision
from .contender import parse_contender
from .plan import Comparison, Trial, shared_parts
from .results import read_comparison
from .statistics import Results

HEARTBEAT = 60.0  # seconds between signs of life of a running trial
_SILENCE = 10 * HEARTBEAT  # after which a worker counts as dead


class TrialQueue:
    """The trials of one comparison, with what the folder's results.json brings: a clone has no queue of its own.

    Raises:
        ScaloraError: the folder holds a comparison of another recipe.
    """

    def __init__(self, folder: Path, comparison: Comparison) -> None:
        kept = read_comparison(folder) if (folder / RESULTS).exists() else None
        if kept:
            _check_same(comparison.recipe, kept.comparison.recipe, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.study = open_study(folder)
        self.running: dict[Trial, optuna.Trial] = {}  # in this process
        recipe = comparison.recipe.model_dump(mode="json")
        # A queue of an earlier version lacks what recipes could not say then: it meant what is the default now.
        stored = recipe | with_precision(self.study.user_attrs.get("recipe", recipe))
        stored = {key: stored[key] for key in recipe}
        _check_same(comparison.recipe, parse_recipe(stored, str(folder)), folder)
        self.study.set_user_attr("recipe", recipe)
        if kept:
            self._seed(kept.results)
            if self.inputs is None and kept.inputs is not None:
                self.keep_inputs(kept.inputs)

    @property
    def inputs(self) -> Any:
        """Digests of what the trials read; None where an earlier version began, or no trial."""
        return self.study.user_attrs.get("inputs")

    def keep_inputs(self, inputs: Any) -> None:
        """Note what all trials must read."""
        self.study.set_user_attr("inputs", inputs)

    def _seed(self, results: Results) -> None:
        """Add what results.json has and this queue lacks: successes, and other ends of trials that it never saw."""
        mine, seen = self.results(), {_trial(frozen) for frozen in self._frozen()}
        for trial, result in results.items():
            failed = "after" not in result
            if (trial not in seen) if failed else ("after" not in mine.get(trial, ())):
                self.study.add_trial(
                    optuna.trial.create_trial(
                        state=_state(result),
                        value=None if failed else result["after"][result["primary"]],
                        user_attrs={"trial": _encode(trial), "result": dict(result)},
                    )
                )

    def enqueue(self, trials: list[Trial], *, retry: bool = False, prune: bool = True) -> None:
        """Add those that are not there yet, and those whose worker died.

        With ``retry`` also those that failed, without ``prune`` those that were given up.
        """
        again = ends_to_repeat(retry, prune)
        settled: set[Trial] = set()
        for frozen in self._frozen():
            if frozen.state == TrialState.RUNNING and not _worker_lives(frozen):
                self.study.tell(frozen.number, state=TrialState.FAIL)
            elif frozen.state not in (TrialState.FAIL, TrialState.PRUNED) or (
                "result" in frozen.user_attrs and again.isdisjoint(frozen.user_attrs["result"])
            ):
                settled.add(_trial(frozen))
        for trial in trials:
            if trial not in settled:
                self.study.enqueue_trial({}, user_attrs={"trial": _encode(trial)})

    def take(self, wanted: Collection[Trial]) -> Trial | None:
        """The next of the wanted trials that waits; None when none does.

        Waiting trials that nobody wants here are dropped on the way: left by a command that asked for other methods or
        rates. A worker that still wants them puts them back.
        """
        while self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            asked = self.study.ask()
            if "trial" in asked.user_attrs:  # else another worker took the last one meanwhile
                trial = _decode(asked.user_attrs["trial"])
                if trial in wanted:
                    self.running[trial] = asked
                    self.heartbeat(trial)
                    return trial
            self.study.tell(asked, state=TrialState.PRUNED)
        return None

    def heartbeat(self, trial: Trial) -> None:
        """A sign of life of a trial this process has taken."""
        with suppress(UpdateFinishedTrialError):  # this process slept so long that another has taken over
            self.running[trial].set_user_attr("alive", [socket.gethostname(), os.getpid(), time.time()])

    def finish(self, trial: Trial, result: dict[str, Any]) -> None:
        """Keep the result of a trial this process has taken, whether it finished, failed or was given up."""
        asked = self.running.pop(trial)
        with suppress(UpdateFinishedTrialError):
            asked.set_user_attr("result", result)
            value = result["after"][result["primary"]] if "after" in result else None
            self.study.tell(asked, value, state=_state(result))

    def workers(self) -> int:
        """Processes that are at work on trials of the study, this one among them."""
        running = [frozen for frozen in self._frozen() if frozen.state == TrialState.RUNNING and _worker_lives(frozen)]
        busy = {tuple(frozen.user_attrs["alive"][:2]) for frozen in running}
        return len(busy | {(socket.gethostname(), os.getpid())})

    def results(self) -> dict[Trial, dict[str, Any]]:
        """All results so far, failures included, except of a trial that is being tried again."""
        found: dict[Trial, dict[str, Any]] = {}
        for frozen in self._frozen():
            if "result" in frozen.user_attrs:
                found[_trial(frozen)] = frozen.user_attrs["result"]
            elif not frozen.state.is_finished() and "after" not in found.get(_trial(frozen), ("after",)):
                del found[_trial(frozen)]
        return found

    def _frozen(self) -> list[FrozenTrial]:
        return [f for f in self.study.get_trials(deepcopy=False) if "trial" in f.user_attrs]


def ends_to_repeat(retry: bool, prune: bool) -> set[str]:
    """The keys of results whose trials run again: failures with ``retry``, those given up without ``prune``."""
    return {end for end, wanted in (("error", retry), ("given_up", not prune)) if wanted}


def open_study(folder: Path) -> optuna.Study:
    """The study in a folder that exists, made where there is none; raises ScaloraError where its file is damaged."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = (folder / QUEUE).resolve()
    try:
        return optuna.create_study(study_name="comparison", storage=f"sqlite:///{file}", load_if_exists=True)
    except (SQLAlchemyError, StorageInternalError) as error:
        raise ScaloraError(
            f"{file} cannot be used ({type(error).__name__}): it is damaged or not yours to write; delete it, and "
            f"{RESULTS} continues the comparison"
        ) from error


def _check_same(mine: Recipe, theirs: Recipe, folder: Path) -> None:
    """Raises ScaloraError where trials of one recipe would not belong to a comparison of the other."""
    parts = shared_parts(theirs)
    for key, value in shared_parts(mine).items():
        if parts[key] != value:
            given = f" ({parts[key]}, not {value})" if isinstance(value, str) else ""
            raise ScaloraError(f"{folder} holds a comparison with another {key}{given}: choose another --output")


def _worker_lives(frozen: FrozenTrial) -> bool:
    """Whether the process that took a trial still runs: it was heard of lately and, if it is of this machine, exists.

    Its existence alone proves nothing: after a restart its number may be another's, and machines share names.
    """
    host, pid, seen = frozen.user_attrs.get("alive", ("", -1, 0.0))
    if time.time() > seen + _SILENCE:
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _state(result: Mapping[str, Any]) -> TrialState:
    """Optuna's word for how a trial ended."""
    if "error" in result:
        return TrialState.FAIL
    return TrialState.PRUNED if "given_up" in result else TrialState.COMPLETE


def _trial(frozen: FrozenTrial) -> Trial:
    return _decode(frozen.user_attrs["trial"])


def _encode(trial: Trial) -> list[Any]:
    return [trial.stage, str(trial.contender), trial.lr, trial.seed]


def _decode(values: list[Any]) -> Trial:
    stage, contender, lr, seed = values
    return Trial(stage, parse_contender(contender, 0), lr, seed)
