"""results.json of a comparison, both ways: who competed on what, each environment once, one trial a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ..common.disk_layout import RESULTS
from ..common.errors import ScaloraError
from ..common.files import write_json
from ..runs.recipe import parse_recipe
from ..runs.stored import of_today
from .admission import Admission, admission
from .contender import Contender, parse_contender
from .plan import CURVE_RANKS, Chosen, Comparison, Trial
from .statistics import Results, chosen_settings, in_order

_FORMAT = 2  # the first had no number, an environment in every trial, and did not say who competed
_POINTS = 12  # of the loss of a tuning trial, which is kept for replays of what is given up; no page shows it


@dataclass(frozen=True)
class ComparisonRecord:
    """A comparison and all that has come of it; command, revision and environment are the last writer's."""

    comparison: Comparison
    results: Results
    command: str
    git_revision: str | None
    environment: Mapping[str, Any]
    inputs: Any = None  # digests of what all trials read, where this is known

    @property
    def chosen(self) -> dict[Contender, Chosen]:
        return chosen_settings(self.results, self.comparison)

    @property
    def admission(self) -> Admission:
        return admission(self.comparison, self.results)


def write_comparison(record: ComparisonRecord, folder: Path) -> None:
    """Write ``folder/results.json``."""
    write_json(folder / RESULTS, encode_comparison(record), depth=2)


def read_comparison(folder: Path) -> ComparisonRecord:
    """Read ``folder/results.json``, also of the format before.

    Raises:
        ScaloraError: there is none, or it cannot be read.
    """
    return decode_comparison(read_results(folder), folder / RESULTS)


def read_results(folder: Path) -> dict[str, Any]:
    """What ``folder/results.json`` holds, of a comparison or of a paper's experiment.

    Raises:
        ScaloraError: there is none, or it is no JSON object.
    """
    file = folder / RESULTS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScaloraError(f"{folder} holds no {RESULTS}: name a folder that compare wrote") from error
    except ValueError as error:
        raise ScaloraError(f"{file} is no JSON ({error}): restore it, or name another folder") from error
    if not isinstance(content, dict):
        raise ScaloraError(f"{file} is no JSON object: restore it, or name another folder")
    return content


def encode_comparison(record: ComparisonRecord) -> dict[str, Any]:
    """A comparison as JSON; what was chosen is there for the eye, the trials say it too."""
    comparison, environments = record.comparison, []
    trials = [_encode_trial(trial, result, environments) for trial, result in in_order(record.results)]
    return {
        "format": _FORMAT,
        "command": record.command,
        "git_revision": record.git_revision,
        "environment": dict(record.environment),
        "recipe": comparison.recipe.model_dump(mode="json"),
        **({} if record.inputs is None else {"inputs": record.inputs}),
        "contenders": [str(contender) for contender in comparison.contenders],
        "rates": list(comparison.rates),
        **({"alphas": list(comparison.alphas)} if comparison.alphas else {}),  # earlier comparisons had no such grid
        "seeds": list(comparison.seeds),
        "tuning_seeds": list(comparison.tuning_seeds),
        "curve": [str(contender) for contender in comparison.curve],
        "fixed": None if comparison.fixed is None else {str(c): lr for c, lr in comparison.fixed.items()},
        "chosen_by": comparison.chosen_by,
        "ranks": comparison.ranks,
        "chosen": {str(setting): lr for setting, lr in record.chosen.values()},
        "environments": environments,
        "trials": trials,
    }


def decode_comparison(content: Mapping[str, Any], file: Path) -> ComparisonRecord:
    """The comparison that :func:`encode_comparison` wrote, or that the version before wrote.

    Raises:
        ScaloraError: it holds no comparison, or one that this version cannot read; the message names `file`.
    """
    if "trials" not in content:
        raise ScaloraError(f"{file} holds no trials of a comparison: name another folder")
    if content.get("format", 1) not in (1, _FORMAT):
        raise ScaloraError(f"{file} has format {content['format']}, this version reads up to {_FORMAT}: update scalora")
    try:
        said = content if "format" in content else {**content, **_unsaid(content)}
        fixed = said["fixed"]
        comparison = Comparison(
            parse_recipe(of_today(said["recipe"]), str(file)),
            tuple(map(_contender, said["contenders"])),
            tuple(said["rates"]),
            tuple(said["seeds"]),
            tuple(said["tuning_seeds"]),
            tuple(map(_contender, said["curve"])),
            None if fixed is None else {_contender(name): lr for name, lr in fixed.items()},
            said.get("chosen_by"),
            said["ranks"],
            tuple(said.get("alphas", ())),
        )
        results = dict(_decode_trial(line, said.get("environments", ())) for line in said["trials"])
        return ComparisonRecord(
            comparison, results, said["command"], said["git_revision"], said["environment"], said.get("inputs")
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ScaloraError(f"{file} is damaged ({reason}): restore it, or name another folder") from error


def _encode_trial(trial: Trial, result: Mapping[str, Any], environments: list[Any]) -> dict[str, Any]:
    kept = dict(result)
    if trial.stage == "tune":
        kept.pop("ranks", None)
        kept |= {"losses": thinned(result["losses"])} if "losses" in result else {}
    if "environment" in kept:
        if kept["environment"] not in environments:
            environments.append(kept["environment"])
        kept["environment"] = environments.index(kept["environment"])
    return {"stage": trial.stage, "contender": str(trial.contender), "lr": trial.lr, "seed": trial.seed, **kept}


def thinned(losses: Sequence[Sequence[float]]) -> list[list[float]]:
    """A curve of at most so many points, each the mean of those around it, at the last one's step; four digits."""
    each = max(1, -(-len(losses) // _POINTS))
    parts = [losses[i : i + each] for i in range(0, len(losses), each)]
    return [[part[-1][0], float(f"{mean(loss for _, loss in part):.4g}")] for part in parts]


def _decode_trial(line: Mapping[str, Any], environments: Any) -> tuple[Trial, dict[str, Any]]:
    result = dict(line)
    trial = Trial(result.pop("stage"), _contender(result.pop("contender")), result.pop("lr"), result.pop("seed"))
    if isinstance(result.get("environment"), int):
        result["environment"] = environments[result["environment"]]
    return trial, result


def _unsaid(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the first format left to be seen from the trials: who competed, LoRA's curve, and whether rates were given.

    Methods that were tuned but for another command lie among the trials too: they are no contenders.
    """
    trials, chosen = content["trials"], content["chosen"]
    tuned: dict[str, list[bool]] = {}
    for line in trials:
        if line["stage"] == "tune":
            tuned.setdefault(line["contender"], []).append("error" in line)
    curve = [f"lora@{rank}" for rank in CURVE_RANKS]
    curve = curve if set(curve) <= set(tuned) else []
    failed = [name for name, errors in tuned.items() if all(errors) and name not in (*chosen, *curve)]
    return {
        "contenders": [*chosen, *failed],
        "curve": curve,
        "fixed": None if tuned else chosen,
        "ranks": any(line.get("ranks") for line in trials if line["stage"] == "final"),
    }


def _contender(text: str) -> Contender:
    return parse_contender(text, 0)
