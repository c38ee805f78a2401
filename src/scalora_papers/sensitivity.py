"""The tuning guide that the paper lacks: what L, the interval, the capacity and the rank do to ScaLoRA."""

from __future__ import annotations

from matplotlib.figure import Figure

from scalora.arena.plan import Contender
from scalora.arena.statistics import primary
from scalora.runs.recipe import Recipe, parse_recipe

from .base import Experiment, Outcome, Setting
from .published import GLUE_SETTINGS
from .table import Measured, Problem, measure, quality, summary
from .table1_glue import glue_problem

_RATES = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16)
_LIPSCHITZ = (None, 3.0, 30.0, 300.0, 3000.0, 30000.0)  # None: calibrated
_INTERVALS = (1, 2, 5, 10, 20, 50)
_CAPACITIES = (2, 4, 8, 16, 32)
_RANKS = (1, 2, 4, 8, 16)


class Sensitivity(Experiment):
    """One setting varied at a time, the others at their defaults, each value at its own best learning rate.

    Small: digits on the dense network, where rank matters, at rank 2. Paper: RTE on DeBERTaV3-base at rank 4, at the
    published learning rate.
    """

    name = "sensitivity"
    summary = "ScaLoRA over L (four orders of magnitude), interval, capacity and rank"
    seeds = 5

    def run(self, setting: Setting) -> Outcome:
        small = setting.scale == "small"
        recipe = digits_recipe(setting) if small else glue_problem(setting, "RTE").recipe
        rates = _RATES if small else (GLUE_SETTINGS["RTE"].rates["scalora"],)
        studies = contenders(recipe.method.rank)
        everyone = tuple(dict.fromkeys(c for study in studies.values() for c in study))
        given = None if small else dict.fromkeys(everyone, rates[0])
        measured = measure(
            setting, [Problem("all", recipe, given)], everyone, rates=rates, seeds=self.seeds, tuning_seeds=2
        )
        table = quality("test metric, mean ± standard error over seeds", measured, {}, percent=False)
        return Outcome(summary(measured), [table], {"sensitivity": draw(measured["all"], studies)})


def contenders(rank: int) -> dict[str, list[Contender]]:
    """What is varied → LoRA first, then a contender per value."""
    lora = Contender("lora", rank)
    return {
        "L": [lora, *(Contender("scalora-i", rank, (("lipschitz", L),) if L else ()) for L in _LIPSCHITZ)],
        "interval": [lora, *(Contender("scalora", rank, (("interval", every),)) for every in _INTERVALS)],
        "capacity": [lora, *(Contender("scalora-i", rank, (("capacity", c),)) for c in _CAPACITIES)],
        "rank": [c for r in _RANKS for c in (Contender("lora", r), Contender("scalora-i", r))],
    }


def digits_recipe(setting: Setting) -> Recipe:
    """recipes/digits.yaml."""
    return parse_recipe(
        {
            "model": "digits-mlp",
            "precision": "float32",
            "task": {
                "kind": "vectors", "features": "pixels", "metric": "nll",
                "data": {"train": "digits-turned", "train_size": 1000, "validation_size": 297, "test_size": 500},
            },
            "method": {"name": "lora", "rank": 2, "alpha": 4, "target_modules": ["layers.0", "layers.1"]},
            "training": {"per_device_train_batch_size": 64, "max_steps": 400, "logging_steps": 20},
            "score_batch_size": 512,
            "output": str(setting.folder / "run"),
        }
    )  # fmt: skip


def draw(measured: Measured, studies: dict[str, list[Contender]]) -> Figure:
    """A panel per setting: test metric over its values, LoRA as a line (in the panel of the rank as a curve)."""
    metric, higher = primary(measured.results)
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    for axis, (what, group) in zip(figure.subplots(1, len(studies)), studies.items(), strict=True):
        for method, colour in (("lora", "grey"), ("scalora", "#2a6f97")):
            ours = [c for c in group if c.method.split("-")[0] == method and measured.values(c)]
            means, errors = zip(*(measured.mean(c) for c in ours), strict=True) if ours else ((), ())
            if what != "rank" and method == "lora":
                for mean in means:
                    axis.axhline(mean, color=colour, linestyle=":", label="LoRA")
                continue
            values = [c.rank if what == "rank" else c.options[0][1] if c.options else None for c in ours]
            labels = ["auto" if value is None else f"{value:g}" for value in values]
            axis.errorbar(labels, means, yerr=errors, marker="o", capsize=3, color=colour, label=method)
        axis.set(xlabel=what, ylabel=f"test {metric} ({'higher' if higher else 'lower'} is better)")
        axis.legend(fontsize=7)
    return figure


EXPERIMENTS = (Sensitivity,)
