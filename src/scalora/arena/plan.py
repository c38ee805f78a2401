"""What a comparison consists of: contenders, a grid of learning rates, seeds; and the recipe of each trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, NamedTuple

from ..common.errors import ScaloraError
from ..methods import MethodSpec, build_method
from ..runs.recipe import Recipe, parse_recipe, read_value

Stage = Literal["tune", "final"]
CURVE_RANKS = (1, 2, 4, 8, 16, 32)


class Contender(NamedTuple):
    """A method at a rank with options of its own, written ``name:option=value@rank``; the last two may be missing."""

    method: str
    rank: int
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{':'.join((self.method, *(f'{name}={value}' for name, value in self.options)))}@{self.rank}"


class Trial(NamedTuple):
    """One training run. Tuning is scored on the validation split, the final runs on the test split."""

    stage: Stage
    contender: Contender
    lr: float  # of the common grid; a method's own factor comes on top
    seed: int


@dataclass(frozen=True)
class Comparison:
    """A recipe, who competes on it, and how.

    Raises:
        ScaloraError: a method is unknown, a value is out of range, or the recipe has no validation data.
    """

    recipe: Recipe
    contenders: tuple[Contender, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    curve: tuple[Contender, ...] = ()  # LoRA over rank: does rank matter on this task at all?
    fixed: Mapping[Contender, float] | None = None  # known rates, for which nothing is tuned
    chosen_by: Literal["nll"] | None = None  # the validation metric that chooses rates; None: the one that decides
    ranks: bool = True  # measure the update's rank in final runs; it costs dense updates time and memory

    def __post_init__(self) -> None:
        data = self.recipe.task.data
        if self.fixed is None and data.validation is None and data.validation_size is None:
            raise ScaloraError(
                "task.data.validation: compare chooses learning rates on validation data; name a source or set "
                "validation_size"
            )
        for name, values in (("--methods", self.contenders), ("--lr", self.rates), ("--seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ScaloraError(
                    f"{name} is {', '.join(map(str, values)) or 'empty'}: give one or more different values"
                )
        for rate in self.rates:
            if not (isfinite(rate) and rate > 0):  # a rate that is no number equals none, and its trial would never end
                raise ScaloraError(f"--lr is {rate:g}: learning rates must be positive and finite")
        for contender in self.everyone:
            build_method(self._method(contender))  # refuses unknown names and options before anything runs

    @property
    def everyone(self) -> tuple[Contender, ...]:
        """Contenders, then those of the rank curve that are not among them."""
        return tuple(dict.fromkeys((*self.contenders, *self.curve)))

    def tuning(self) -> list[Trial]:
        """All tuning trials, the rank curve first, each rate for every contender before the next."""
        if self.fixed is not None:
            return []
        order = dict.fromkeys((*self.curve, *self.contenders))
        return [Trial("tune", c, lr, seed) for c in order for lr in self.rates for seed in self.tuning_seeds]

    def final(self, chosen: dict[Contender, float]) -> list[Trial]:
        """The final trials at the chosen rates, seed by seed."""
        return [Trial("final", c, chosen[c], seed) for seed in self.seeds for c in self.contenders if c in chosen]

    def trial_recipe(self, trial: Trial, output: str) -> Recipe:
        """The recipe of one trial: same data and order for all methods at a seed."""
        content = self.recipe.model_dump(mode="json")
        content["method"] = self._method(trial.contender).model_dump(mode="json")
        factor = build_method(self._method(trial.contender)).lr_factor
        content["training"] |= {
            "learning_rate": trial.lr * factor, "seed": trial.seed, "data_seed": trial.seed, "save_strategy": "no",
        }  # fmt: skip
        if factor != 1 and self.fixed is None and self.recipe.task.kind == "classification":
            # A method's factor is for what it adapts; the head that starts at random is trained alike by all.
            content["head_learning_rate"] = content["head_learning_rate"] or trial.lr
        content["output"] = output
        return parse_recipe(content)

    def _method(self, contender: Contender) -> MethodSpec:
        """The recipe's method section for this contender; the recipe's own options only for the method it names."""
        own = self.recipe.method
        options = (own.options if own.name == contender.method else {}) | dict(contender.options)
        alpha = None if own.alpha is None else own.alpha * contender.rank / own.rank  # the same scale s at every rank
        return own.model_copy(
            update={"name": contender.method, "rank": contender.rank, "alpha": alpha, "options": options}
        )


_SHARED = ("model", "dtype", "precision", "config", "attn_implementation", "task", "training", "head_learning_rate")


def shared_parts(recipe: Recipe) -> dict[str, Any]:
    """What must be equal for a stored comparison to be continued; methods, rates and seeds may be added to.

    Where the data lie is not part of it: a folder may have another path on another day.
    """
    content = recipe.model_dump(mode="json")
    del content["task"]["data"]["folder"]
    for own in ("learning_rate", "seed", "data_seed", "save_strategy"):  # every trial has its own
        content["training"].pop(own, None)
    method = recipe.method
    return {key: content[key] for key in _SHARED} | {
        "target_modules": method.target_modules,
        "alpha": method.scaled_alpha / method.rank,
        "dropout": method.dropout,
    }


def parse_contender(text: str, rank: int) -> Contender:
    """Read ``name:option=value:…@rank``; without a rank of its own it has `rank`.

    Raises:
        ScaloraError: the rank is no whole number of at least 1, or an option has no value.
    """
    start, separator, own = text.partition("@")
    if separator and not (own.isdecimal() and int(own) >= 1):
        raise ScaloraError(f"--methods {text!r}: write method@rank with a whole rank, e.g. lora@16")
    name, *options = start.split(":")
    if name == "peft" and options:
        name = f"peft:{options.pop(0)}"
    pairs = []
    for option in options:
        key, separator, value = option.partition("=")
        if not (separator and key and value):
            raise ScaloraError(f"--methods {text!r}: write method:option=value, e.g. mora:type=1@8")
        if key in dict(pairs):
            raise ScaloraError(f"--methods {text!r}: {key} is there twice, and only one would count: leave one out")
        pairs.append((key, read_value(value)))
    return Contender(name, int(own) if own else rank, tuple(pairs))
