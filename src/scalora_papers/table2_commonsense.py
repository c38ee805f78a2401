"""Table 2 and fig. 3 of 2510.23818: commonsense reasoning. LLaMA2-7B and LLaMA3-8B, or SmolLM2 on the files at hand."""

from __future__ import annotations

from statistics import median
from typing import Any

from matplotlib.figure import Figure

from scalora.arena.plan import Contender
from scalora.common.errors import ScaloraError
from scalora.methods import MethodSpec, build_method
from scalora.runs.recipe import Recipe, parse_recipe
from scalora.tasks.benchmarks import commonsense_task

from .base import Experiment, Outcome, Setting
from .published import COMMONSENSE_MEANS, COMMONSENSE_RATES, COMMONSENSE_SETS, MEMORY_ABOVE_LORA
from .table import Measured, Problem, costs, measure, plans, quality, summary, verdicts

COMMONSENSE_RANK = 8
METHODS = ("lora", "relora", "lora-ga", "mora", "hira", "scalora", "scalora-i")
COMMONSENSE_CONTENDERS = (
    *(Contender(name, COMMONSENSE_RANK) for name in METHODS),
    Contender("lora", 4 * COMMONSENSE_RANK),
)
MODELS = {"LLaMA2-7B": "meta-llama/Llama-2-7b-hf", "LLaMA3-8B": "meta-llama/Meta-Llama-3-8B"}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
COMMONSENSE_ROWS = dict(zip(COMMONSENSE_SETS, (9427, 16113, 33410, 39905, 40398, 2251, 1119, 4957), strict=True))
_RATES = (1e-3, 3e-3)


class Table2(Experiment):
    """Every set trained on its own. Rates that the paper does not print (ReLoRA, LoRA-GA) are LoRA's."""

    name = "table2"
    summary = "commonsense reasoning: LoRA, ReLoRA, LoRA-GA, MoRA, HiRA, ScaLoRA(-I) at rank 8, LoRA at 32"
    seeds = 3

    def run(self, setting: Setting) -> Outcome:
        if setting.scale == "small":
            problems = small_problems(setting)
            measured = measure(setting, problems, COMMONSENSE_CONTENDERS, rates=_RATES, seeds=self.seeds)
            published = {name: {"mean": value} for name, value in COMMONSENSE_MEANS["LLaMA2-7B"].items()}
            table = quality("obtained ± standard error (published mean of eight sets: LLaMA2-7B)", measured, published)
            remarks = [*verdicts(measured), "SmolLM2-135M on subsets is no LLaMA: compare differences, not levels."]
            return Outcome(summary(measured), [table], remarks=remarks)
        content, tables, remarks = {}, [], []
        for model in MODELS:
            problems = [commonsense_problem(setting, model, name) for name in COMMONSENSE_SETS]
            measured = measure(setting, problems, COMMONSENSE_CONTENDERS, rates=_RATES, seeds=self.seeds)
            by_set = {problem.removeprefix(f"{model}-"): each for problem, each in measured.items()}
            published = {name: {"mean": value} for name, value in COMMONSENSE_MEANS[model].items()}
            tables.append(quality(f"{model}: obtained ± standard error (published)", by_set, published))
            remarks += [f"{model}: {line}" for line in verdicts(measured)]
            content[model] = summary(measured)
        return Outcome(content, tables, remarks=remarks)

    def plan(self, setting: Setting) -> Outcome:
        return plans([commonsense_problem(setting, m, name) for m in MODELS for name in COMMONSENSE_SETS], "causal-lm")


class Fig3(Experiment):
    """Twenty steps of every method on one set, at one rate: only what they cost is looked at.

    Round by round, a seed each, so that a machine that slows down meanwhile slows all methods.
    """

    name = "fig3"
    summary = "time and memory of each method relative to LoRA"
    steps, rounds = 20, 3

    def run(self, setting: Setting) -> Outcome:
        small = setting.scale == "small"
        first = small_problems(setting)[0] if small else commonsense_problem(setting, "LLaMA2-7B", "ARC-e")
        content = first.recipe.model_dump(mode="json")
        content["training"] |= {"max_steps": self.steps, "warmup_steps": 1}
        content["task"]["data"] |= {"test_size": 8}
        problem = Problem(first.name, parse_recipe(content), dict.fromkeys(COMMONSENSE_CONTENDERS, 1e-4))
        measured = measure(setting, [problem], COMMONSENSE_CONTENDERS, rates=(1e-4,), seeds=self.rounds, ranks=False)
        table = costs(measured, MEMORY_ABOVE_LORA)
        return Outcome(summary(measured), [table], {"fig3": _bars(measured[problem.name])})

    def plan(self, setting: Setting) -> Outcome:
        return plans([commonsense_problem(setting, "LLaMA2-7B", "ARC-e")], "causal-lm")


def small_problems(setting: Setting) -> list[Problem]:
    """A problem for every set of which there are a train and a test file; 40 steps, so that all take an afternoon."""
    if setting.data is None:
        setting.file("commonsense/ARC-Easy/train.json")  # says what is missing
    assert setting.data is not None
    found = []
    for name in COMMONSENSE_SETS:
        task = commonsense_task(
            name, setting.data, train_size=320, validation_size=100, test_size=300, max_length=192, harness=True
        )
        place = setting.data / task["data"]["train"]
        if place.is_file():
            found.append(Problem(name, _recipe(setting, name, "smollm2-135m-instruct", task, _SMALL)))
    if not found:
        raise ScaloraError(f"--data {setting.data}: there is no commonsense/<SET>/train.json in it")
    return found


def commonsense_problem(setting: Setting, model: str, name: str) -> Problem:
    """LLaMA at the settings of the paper."""
    rates = COMMONSENSE_RATES[model]
    fixed = {}
    for contender in COMMONSENSE_CONTENDERS:
        key = (
            f"{contender.method}@{contender.rank}"
            if contender.rank != COMMONSENSE_RANK
            else contender.method.removesuffix("-i")
        )
        factor = build_method(MethodSpec(name=contender.method)).lr_factor
        fixed[contender] = rates.get(key, rates["lora"])[name] / factor
    steps = -(-COMMONSENSE_ROWS[name] // 16) * 3
    training = {
        "per_device_train_batch_size": 16, "num_train_epochs": 3, "lr_scheduler_type": "cosine",
        "warmup_steps": int(0.03 * steps), "bf16": True,
    }  # fmt: skip
    task = commonsense_task(name, setting.data, max_length=256, harness=True)
    recipe = _recipe(setting, f"{model}-{name}", MODELS[model], task, training, dtype="bfloat16", dropout=0.05)
    return Problem(f"{model}-{name}", recipe, fixed, COMMONSENSE_ROWS[name])


_SMALL = {
    "per_device_train_batch_size": 8, "num_train_epochs": 1, "warmup_steps": 5,
    "train_sampling_strategy": "group_by_length",
}  # fmt: skip


def _recipe(
    setting: Setting, name: str, model: str, task: dict[str, Any], training: dict[str, Any], *,
    dtype: str = "float32", dropout: float = 0.0,
) -> Recipe:  # fmt: skip
    return parse_recipe(
        {
            "model": model,
            "dtype": dtype,
            "task": task,
            "method": {
                "name": "lora", "rank": COMMONSENSE_RANK, "alpha": 16, "dropout": dropout, "target_modules": TARGETS,
            },
            "training": training,
            "output": str(setting.folder / name / "run"),
        }
    )  # fmt: skip


def _bars(measured: Measured) -> Figure:
    """Seconds per step and peak memory of every method as multiples of LoRA's: median, lowest and highest round."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    contenders = [c for c in measured.comparison.contenders if measured.costs(c, "seconds_per_step")]
    keys = {"seconds_per_step": "seconds per step", "peak_memory_bytes": "peak memory"}
    for axis, (key, label) in zip(figure.subplots(1, 2), keys.items(), strict=True):
        ratios = [measured.costs(c, key) for c in contenders]
        middle = [median(each) for each in ratios]
        reach = [
            [m - min(each) for m, each in zip(middle, ratios, strict=True)],
            [max(each) - m for m, each in zip(middle, ratios, strict=True)],
        ]
        axis.bar([str(c) for c in contenders], middle, yerr=reach, capsize=3, color="#2a6f97")
        axis.axhline(1, color="grey", linestyle=":")
        axis.set(ylabel=f"{label} / LoRA's")
        axis.tick_params(axis="x", rotation=45)
    return figure


EXPERIMENTS = (Table2, Fig3)
