"""Where trials wait, run and are kept: an optuna study, shared by any number of workers."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from ..common.disk_layout import RESULTS, UNSENT
from ..common.errors import ScaloraError
from ..common.files import write_json
from ..runs.inputs import Inputs
from ..runs.recipe import Recipe, parse_recipe
from ..runs.stored import of_today
from .contender import parse_contender
from .liveness import Watch, count_workers, sign
from .patience import Patient, patient
from .plan import Comparison, Trial, shared_parts
from .results import ComparisonRecord, read_comparison
from .statistics import Results
from .storage import AWAY, Storage, database_time, note, noted, open_study


class TrialQueue(Patient):
    """The trials of one comparison, with what the folder's results.json brings: a clone has no queue of its own.

    Args:
        folder: trials.sqlite3 lies here, unless there is a `storage`.
        comparison: its recipe is that of all trials.
        storage: the database that machines share, if they do. Where it is away, methods wait for it.
        log: takes a line when that happens.

    Raises:
        ScaloraError: the folder or the study holds a comparison of another recipe, or the database cannot be used;
            from any method, where it stays away.
    """

    def __init__(
        self,
        folder: Path,
        comparison: Comparison,
        storage: Storage | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        kept = read_comparison(folder) if (folder / RESULTS).exists() else None
        if kept:
            _check_same(comparison.recipe, kept.comparison.recipe, str(folder), "--output")
        super().__init__(folder, storage, log)
        self.place, self.option = (str(folder), "--output") if storage is None else (str(storage), "--study")
        folder.mkdir(parents=True, exist_ok=True)
        self.study, self._engine = open_study(folder, storage)
        self.running: dict[Trial, optuna.Trial] = {}  # in this process
        self._watch = Watch()
        self._begin(comparison, kept)

    @patient
    def _begin(self, comparison: Comparison, kept: ComparisonRecord | None) -> None:
        recipe = comparison.recipe.model_dump(mode="json")
        note(self.study, "recipe", recipe)
        # A queue of an earlier version lacks what recipes could not say then: it meant what is the default now.
        stored = recipe | of_today(noted(self.study, "recipe"))
        stored = {key: stored[key] for key in recipe}
        _check_same(comparison.recipe, parse_recipe(stored, self.place), self.place, self.option)
        if kept:
            if self.inputs is None and kept.inputs is not None:
                self.keep_inputs(kept.inputs)
            if self.inputs is not None and kept.inputs is not None:
                Inputs(**self.inputs).refuse_other(kept.inputs, str(self.folder / RESULTS), "choose another --output")
            self._seed(kept.results)
        self._hand_in()

    @property
    @patient
    def inputs(self) -> Any:
        """Digests of what the trials read; None where an earlier version began, or no trial."""
        return noted(self.study, "inputs")

    @patient
    def keep_inputs(self, inputs: Any) -> None:
        """Note what all trials must read, unless another worker has."""
        note(self.study, "inputs", inputs)

    def _seed(self, results: Results) -> None:
        """Add what results.json has and this queue lacks: successes, and other ends of trials that it never saw."""
        mine, seen = self.results(), {_trial(frozen) for frozen in self._frozen()}
        for trial, result in results.items():
            failed = "after" not in result
            if (trial not in seen) if failed else ("after" not in mine.get(trial, ())):
                self._add(trial, result)

    def _add(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Add a trial that has ended."""
        self.study.add_trial(
            optuna.trial.create_trial(
                state=_state(result),
                value=result["after"][result["primary"]] if "after" in result else None,
                user_attrs={"trial": _encode(trial), "result": dict(result)},
            )
        )

    def _hand_in(self) -> None:
        """Add results of trials that ended while the database was away: their workers left them in the folder."""
        for file in sorted(self.folder.glob(UNSENT.format("*"))) if self.storage else ():
            with suppress(FileNotFoundError):  # its worker got through meanwhile
                left = json.loads(file.read_text(encoding="utf-8"))
                if left["study"] == self.study.study_name:
                    self._add_late(_decode(left["trial"]), left["result"])
                    file.unlink()

    def _add_late(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Add what another attempt has not brought meanwhile."""
        if "after" not in self.results().get(trial, ()):
            self._add(trial, result)

    @patient
    def enqueue(self, trials: list[Trial], *, retry: bool = False, prune: bool = True) -> None:
        """Add those that are not there yet, and those whose worker died.

        With ``retry`` also those that failed, without ``prune`` those that were given up.
        """
        again, everything, now = ends_to_repeat(retry, prune), self._frozen(), self._now()
        settled: set[Trial] = set()
        for frozen in everything:
            if frozen.state == TrialState.RUNNING and self._watch.is_dead(frozen, now):
                with suppress(UpdateFinishedTrialError):  # another worker saw it too
                    self.study.tell(frozen.number, state=TrialState.FAIL, skip_if_finished=True)
            elif frozen.state not in (TrialState.FAIL, TrialState.PRUNED) or (
                "result" in frozen.user_attrs and again.isdisjoint(frozen.user_attrs["result"])
            ):
                settled.add(_trial(frozen))
        ends = Counter(_trial(frozen) for frozen in everything if "result" in frozen.user_attrs)
        for trial in trials:
            if trial not in settled:
                self.study.enqueue_trial({}, user_attrs={"trial": _encode(trial), "ends": ends[trial]})

    @patient
    def take(self, wanted: Collection[Trial]) -> Trial | None:
        """The next of the wanted trials that waits; None when none does.

        Waiting trials that nobody wants here are dropped on the way: left by a command that asked for other methods or
        rates. A worker that still wants them puts them back.
        """
        while self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            asked = self.study.ask()
            if "trial" in asked.user_attrs:  # else another worker took the last one meanwhile
                trial = _decode(asked.user_attrs["trial"])
                if trial in wanted and self._claim(asked, trial):
                    return trial
            with suppress(UpdateFinishedTrialError):
                self.study.tell(asked, state=TrialState.PRUNED, skip_if_finished=True)
        return None

    def _claim(self, asked: optuna.Trial, trial: Trial) -> bool:
        """Whether a trial just taken is for this process to run.

        Workers that look at one moment each put it there. The first of those counts, and none that was put there
        before another came to its end.
        """
        try:
            sign(asked, self._now())
        except UpdateFinishedTrialError:  # this process slept, and was taken for dead
            return False
        others = [each for each in self._frozen() if each.number != asked.number and _trial(each) == trial]
        if any(each.number < asked.number and not each.state.is_finished() for each in others):
            return False
        ends = sum("result" in each.user_attrs for each in others)
        if ends > asked.user_attrs.get("ends", ends):
            return False
        self.running[trial] = asked
        return True

    def heartbeat(self, trial: Trial) -> None:
        """A sign of life of a trial this process has taken; where it fails, the next one is soon."""
        with suppress(UpdateFinishedTrialError, *AWAY):  # this process slept so long that another has taken over
            sign(self.running[trial], self._now())

    def _now(self) -> float:
        return database_time(self._engine)

    def finish(self, trial: Trial, result: dict[str, Any]) -> None:
        """Keep the result of a trial this process has taken, whether it finished, failed or was given up.

        On its way to a shared database it lies in the folder. What ends this process leaves it there.
        """
        asked = self.running.pop(trial)
        if self.storage is None:
            self._tell(asked, trial, result)
            return
        file = self.folder / UNSENT.format(uuid.uuid4().hex)
        write_json(file, {"study": self.study.study_name, "trial": _encode(trial), "result": result})
        self._tell(asked, trial, result)
        file.unlink(missing_ok=True)

    @patient
    def _tell(self, asked: optuna.Trial, trial: Trial, result: dict[str, Any]) -> None:
        try:
            asked.set_user_attr("result", result)
            value = result["after"][result["primary"]] if "after" in result else None
            self.study.tell(asked, value, state=_state(result), skip_if_finished=True)
        except UpdateFinishedTrialError:  # it was taken for dead, or this is done for the second time
            if "after" in result:
                self._add_late(trial, result)

    def give_back(self) -> None:
        """Let others take what this process runs no more, without waiting until they miss it."""
        while self.running:
            _, asked = self.running.popitem()
            with suppress(UpdateFinishedTrialError, *AWAY):
                self.study.tell(asked, state=TrialState.FAIL, skip_if_finished=True)

    @patient
    def workers(self) -> int:
        """Processes that are at work on trials of the study, this one among them."""
        running = [frozen for frozen in self._frozen() if frozen.state == TrialState.RUNNING]
        return count_workers(running, self._now())

    @patient
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


def _check_same(mine: Recipe, theirs: Recipe, place: str, option: str) -> None:
    """Raises ScaloraError where trials of one recipe would not belong to a comparison of the other."""
    parts = shared_parts(theirs)
    for key, value in shared_parts(mine).items():
        if parts[key] != value:
            given = f" ({parts[key]}, not {value})" if isinstance(value, str) else ""
            raise ScaloraError(f"{place} holds a comparison with another {key}{given}: choose another {option}")


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
