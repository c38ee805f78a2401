"""What a comparison consists of: contenders, the grid they are tuned on, seeds; and the recipe of each trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, Literal, NamedTuple

from ..common.errors import ScaloraError
from ..methods import MethodSpec, build_method, method_class
from ..runs.recipe import Recipe, parse_recipe
from .contender import Contender

Stage = Literal["tune", "final"]
CURVE_RANKS = (1, 2, 4, 8, 16, 32)


class Chosen(NamedTuple):
    """What tuning chooses for a contender: one value of each option, and a rate."""

    contender: Contender
    lr: float  # of the common grid; a method's own factor comes on top


class Trial(NamedTuple):
    """One training run. Tuning is scored on the validation split, the final runs on the test split."""

    stage: Stage
    contender: Contender  # with one value of each option
    lr: float  # of the common grid
    seed: int

    def order(self) -> tuple[Any, ...]:
        """What trials are sorted by."""
        return self.stage, self.contender.order(), self.lr, self.seed


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
    alphas: tuple[float, ...] = ()  # LoRA's alpha at the recipe's rank, tuned beside the rate; empty: the recipe's own

    def __post_init__(self) -> None:
        data = self.recipe.task.data
        if self.fixed is None and data.validation is None and data.validation_size is None:
            raise ScaloraError(
                "task.data.validation: compare chooses learning rates on validation data; name a source or set "
                "validation_size"
            )
        grids: dict[str, tuple[Any, ...]] = {"--methods": self.contenders, "--lr": self.rates, "--seeds": self.seeds}
        for name, values in (grids | ({"--alpha": self.alphas} if self.alphas else {})).items():
            if not values or len(set(values)) < len(values):
                raise ScaloraError(
                    f"{name} is {', '.join(map(str, values)) or 'empty'}: give one or more different values"
                )
        for rate in self.rates:
            if not (isfinite(rate) and rate > 0):  # a rate that is no number equals none, and its trial would never end
                raise ScaloraError(f"--lr is {rate:g}: learning rates must be positive and finite")
        for alpha in self.alphas:
            if not (isfinite(alpha) and alpha > 0):
                raise ScaloraError(f"--alpha is {alpha:g}: give positive, finite numbers")
        for contender, settings in self.settings.items():  # refuses unknown names and options before anything runs
            if self.fixed is not None and len(settings) > 1:
                raise ScaloraError(f"{contender} has several settings, and at given rates nothing is tuned: give one")

    @property
    def everyone(self) -> tuple[Contender, ...]:
        """Contenders, then those of the rank curve that are not among them."""
        return tuple(dict.fromkeys((*self.contenders, *self.curve)))

    @cached_property
    def settings(self) -> dict[Contender, tuple[Contender, ...]]:
        """Contender → all that tuning chooses among but the rate: one value per option and, with a scale, of alpha.

        The recipe's own alpha is left out of a setting, so that a trial is the same one with and without a grid.
        """
        return {c: tuple(dict.fromkeys(map(self._plain, self._grid(c).settings()))) for c in self.everyone}

    def varied(self, contender: Contender, choice: Chosen) -> dict[str, Any]:
        """What was chosen of that for which a contender has several values: option → value."""
        chosen = dict(choice.contender.options)
        names = [name for name, value in self._grid(contender).options if isinstance(value, tuple)]
        return {name: chosen[name] if name in chosen else _short(self._alpha(choice.contender)) for name in names}

    def tuning(self) -> list[Trial]:
        """All tuning trials, the rank curve first, each rate for every setting before the next.

        Rates go from the middle of the grid outwards: the sooner a good one is known, the sooner others are given up.
        """
        if self.fixed is not None:
            return []
        order = dict.fromkeys(each for c in (*self.curve, *self.contenders) for each in self.settings[c])
        rates, middle = sorted(self.rates), (len(self.rates) - 1) / 2
        rates = [rates[i] for i in sorted(range(len(rates)), key=lambda i: abs(i - middle))]
        return [Trial("tune", each, lr, seed) for each in order for lr in rates for seed in self.tuning_seeds]

    def final(self, chosen: Mapping[Contender, Chosen]) -> list[Trial]:
        """The final trials at what was chosen, seed by seed."""
        found = [Trial("final", *chosen[c], seed) for seed in self.seeds for c in self.contenders if c in chosen]
        return list(dict.fromkeys(found))

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

    def _grid(self, contender: Contender) -> Contender:
        """The contender with the grid of alpha as one more option, where it has a scale and names none of its own."""
        named = any(name.endswith("alpha") for name, _ in contender.options)
        if not self.alphas or named or not method_class(contender.method).has_alpha:
            return contender
        relative = contender.rank / self.recipe.method.rank  # the same scales s at every rank
        alphas = tuple(_short(alpha * relative) for alpha in self.alphas)
        return contender._replace(options=(*contender.options, ("alpha", alphas)))

    def _plain(self, setting: Contender) -> Contender:
        """The setting without an alpha that is its own anyway."""
        rest = setting._replace(options=tuple(option for option in setting.options if option[0] != "alpha"))
        return rest if self._alpha(setting) == self._alpha(rest) else setting

    def _alpha(self, setting: Contender) -> float | None:
        return build_method(self._method(setting)).alpha

    def _method(self, setting: Contender) -> MethodSpec:
        """The recipe's method section for this setting; the recipe's own options only for the method it names."""
        own = self.recipe.method
        options = (own.options if own.name == setting.method else {}) | dict(setting.options)
        alpha = None if own.alpha is None else own.alpha * setting.rank / own.rank  # the same scale s at every rank
        if "alpha" in options and method_class(setting.method).has_alpha:
            alpha = options.pop("alpha")
            if not isinstance(alpha, int | float) or not (isfinite(alpha) and alpha > 0):
                raise ScaloraError(f"--methods {str(setting)!r}: alpha is {alpha!r}: give a positive number")
        return own.model_copy(update={"name": setting.method, "rank": setting.rank, "alpha": alpha, "options": options})


def _short(number: float | None) -> float | None:
    """Whole numbers without a point."""
    return int(number) if number is not None and number == int(number) else number


_SHARED = (
    "model", "dtype", "quantization", "precision", "config", "attn_implementation", "task", "training",
    "head_learning_rate",
)  # fmt: skip


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
        "method.options": {method.name: method.options} if method.options else {},  # trials of that method have them
        "target_modules": method.target_modules,
        "alpha": method.scaled_alpha / method.rank,
        "dropout": method.dropout,
    }
