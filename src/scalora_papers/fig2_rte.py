"""Fig. 2 of 2510.23818: what happens inside a run on RTE."""

from __future__ import annotations

from math import ceil
from typing import Any

from matplotlib.figure import Figure
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.algebra.lowrank import numerical_rank
from scalora.arena.plan import Contender
from scalora.layers.peft_lora import find_layers
from scalora.methods import MethodSpec, build_method
from scalora.methods.support.gradients import mean_gradients
from scalora.runs.recipe import Recipe, parse_recipe
from scalora.runs.training import Watcher, train

from .base import Experiment, Outcome, Setting, TextTable
from .published import GLUE_SETTINGS
from .table import plans
from .table1_glue import GLUE_RANK, glue_problem, small_recipe

_POINTS = 10


class Fig2(Experiment):
    """One run each of LoRA, a larger LoRA, and ScaLoRA (I = 1) in the default store and, as in the paper, in W."""

    name = "fig2"
    summary = "RTE: loss, rank of the update, share of layers with rank G ≥ 2r and where Theorem 5 applies"
    runs = (
        Contender("lora", GLUE_RANK), Contender("lora", 4 * GLUE_RANK),
        Contender("scalora", GLUE_RANK), Contender("scalora", GLUE_RANK, (("accumulate", "base"),)),
    )  # fmt: skip
    epochs = 3

    def run(self, setting: Setting) -> Outcome:
        content = {}
        for contender in self.runs:
            setting.log(f"{contender}")
            watcher = _Ranks(contender.rank)
            metrics = train(self.recipe(setting, contender), overwrite=True, split="test", watcher=watcher).metrics
            content[str(contender)] = {
                "loss": [[e["step"], e["loss"]] for e in metrics["log"] if "loss" in e],
                "rank": [[e["step"], e["mean"]] for e in metrics["ranks"]],
                "gradient_rank_share": watcher.found,
                "theorem5_share": [[e["step"], e["shares"].get("column", 0.0)] for e in metrics["events"]],
                "after": metrics["after"],
                "steps": metrics["steps"],
            }
        return Outcome(content, [_table(content)], {"fig2": _draw(content)})

    def plan(self, setting: Setting) -> Outcome:
        return plans([glue_problem(setting, "RTE")], "sequence-classification")

    def recipe(self, setting: Setting, contender: Contender) -> Recipe:
        if setting.scale == "paper":
            problem = glue_problem(setting, "RTE")
            base, rate = problem.recipe, GLUE_SETTINGS["RTE"].rates[contender.method]
        else:
            setting.file("glue/RTE/train.tsv")
            base = small_recipe(setting, "RTE", passes=self.epochs)
            rate = 1e-3 * build_method(MethodSpec(name=contender.method)).lr_factor
        content = base.model_dump(mode="json")
        content["method"] |= {
            "name": contender.method, "rank": contender.rank, "alpha": 2.0 * contender.rank,
            "options": dict(contender.options),
        }  # fmt: skip
        content["training"] |= {"learning_rate": rate, "save_strategy": "no"}
        content["output"] = str(setting.folder / str(contender).replace(":", "-"))
        return parse_recipe(content)


class _Ranks(Watcher, TrainerCallback):
    """Share of layers whose full gradient, over one batch, has numerical rank 2r or more."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.found: list[list[float]] = []
        self.callbacks = (self,)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        if state.global_step % ceil(state.max_steps / _POINTS) or not isinstance(model, PeftModel):
            return
        # The trained adapters' own gradients were used up by this step: nothing of the run is touched.
        gradients = mean_gradients(model, find_layers(model), kwargs["train_dataloader"], args, batches=1)
        ranks = [int(numerical_rank(G.svd().S, *G.shape)) for G in gradients.values()]
        self.found.append([state.global_step, sum(rank >= 2 * self.rank for rank in ranks) / len(ranks)])


def _table(content: dict[str, Any]) -> TextTable:
    rows = []
    for name, run in content.items():
        theorem5 = [share for _, share in run["theorem5_share"]]
        rows.append(
            [
                name, f"{run['loss'][-1][1]:.4f}", f"{run['rank'][-1][1]:.1f}",
                f"{sum(s for _, s in run['gradient_rank_share']) / max(1, len(run['gradient_rank_share'])):.0%}",
                f"{sum(theorem5) / len(theorem5):.0%}" if theorem5 else "",
                f"{next(iter(run['after'].values())):.4f}",
            ]
        )  # fmt: skip
    rows.append(["paper", "", "LoRA 4, ScaLoRA up to 54", "", "about 80%", ""])
    columns = [
        "run",
        "last loss",
        "last mean rank",
        "rank G ≥ 2r (mean share)",
        "Theorem 5 (mean share)",
        "test metric",
    ]
    return TextTable("inside the runs", columns, rows)


def _draw(content: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    panels = (
        ("loss", "training loss"), ("rank", "mean rank of the update"),
        ("gradient_rank_share", "share of layers, rank G ≥ 2r"), ("theorem5_share", "share of layers, Theorem 5"),
    )  # fmt: skip
    for axis, (key, label) in zip(axes, panels, strict=True):
        for (name, run), colour in zip(content.items(), ("grey", "#e09f3e", "#2a6f97", "#b33951"), strict=False):
            if run[key]:
                steps, values = zip(*run[key], strict=True)
                axis.plot(steps, values, color=colour, label=name, linewidth=1)
        axis.set(xlabel="optimizer step", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    for axis in axes[2:]:
        axis.set_ylim(0, 1.05)
    return figure


EXPERIMENTS = (Fig2,)
