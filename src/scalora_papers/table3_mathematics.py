"""Table 3 of 2510.23818: mathematics. Gemma-3-12B on MetaMathQA, or SmolLM2 on GSM8K's training set."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from scalora.arena.plan import Contender
from scalora.runs.recipe import Recipe, parse_recipe

from .base import Experiment, Outcome, Setting, TextTable
from .table import Measured, Problem, measure, plans, quality, summary, verdicts
from .table2_commonsense import TARGETS

MATHEMATICS_RANK = 8
MATHEMATICS_CONTENDERS = tuple(Contender(name, MATHEMATICS_RANK) for name in ("lora", "scalora-scalar", "scalora-i"))
_PAPER_RATE = 1e-4  # the paper prints none
_RATES = (1e-3, 3e-3)
_META_ROWS = 395_000


class Table3(Experiment):
    """The paper prints an order, LoRA < scalar-only < ScaLoRA-I on both sets, and no values here."""

    name = "table3"
    summary = "mathematics: LoRA, scalar-only and ScaLoRA-I by exact match after generation, and by likelihood"
    seeds = 3

    def run(self, setting: Setting) -> Outcome:
        # By exact match a rate would be chosen by chance: a small model solves none or one of forty problems.
        measured = measure(
            setting, self.problems(setting), MATHEMATICS_CONTENDERS, rates=_RATES, seeds=self.seeds, chosen_by="nll"
        )
        tables = [quality("exact match, % ± standard error", measured, {}), likelihood(measured)]
        remarks = [*verdicts(measured), "published: LoRA < scalar-only < ScaLoRA-I on GSM8K and MATH"]
        return Outcome(summary(measured), tables, remarks=remarks)

    def plan(self, setting: Setting) -> Outcome:
        return plans(paper_problems(setting), "causal-lm")

    def problems(self, setting: Setting) -> list[Problem]:
        if setting.scale == "paper":
            return paper_problems(setting)
        setting.file("math/gsm8k/train.jsonl")
        data = {
            "folder": str(setting.data), "train": "math/gsm8k/train.jsonl", "test": "math/gsm8k/test.jsonl",
            "train_size": 300, "validation_size": 40, "test_size": 60,
        }  # fmt: skip
        training = {
            "per_device_train_batch_size": 4, "num_train_epochs": 1, "warmup_steps": 8,
            "train_sampling_strategy": "group_by_length",
        }  # fmt: skip
        return [Problem("GSM8K", _recipe(setting, "GSM8K", "smollm2-135m-instruct", data, training, new_tokens=256))]


def paper_problems(setting: Setting) -> list[Problem]:
    """Trained on MetaMathQA, tested on GSM8K and on MATH; the rate is ours, at which nothing is tuned."""
    training = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "num_train_epochs": 2, "bf16": True,
    }  # fmt: skip
    data = {"train": "meta-math/MetaMathQA", "form": "published"}
    tests = {"GSM8K": "openai/gsm8k:main", "MATH": "HuggingFaceH4/MATH-500"}
    return [
        Problem(
            name,
            _recipe(
                setting, name, "google/gemma-3-12b-pt", data | {"test": test}, training,
                dtype="bfloat16", dropout=0.05, max_length=256,
            ),
            dict.fromkeys(MATHEMATICS_CONTENDERS, _PAPER_RATE),
            _META_ROWS,
        )
        for name, test in tests.items()
    ]  # fmt: skip


def likelihood(measured: Mapping[str, Measured]) -> TextTable:
    """Nats per token of the reference solutions, mean over seeds: it tells methods apart where exact match cannot."""
    rows = []
    for contender in MATHEMATICS_CONTENDERS:
        finals = [each.finals(contender).values() for each in measured.values()]
        rows.append([str(contender), *(f"{mean(r['after']['nll'] for r in f):.4f}" if f else "failed" for f in finals)])
    return TextTable("nll of the reference solutions, mean over seeds", ["method", *measured], rows)


def _recipe(
    setting: Setting, name: str, model: str, data: dict[str, Any], training: dict[str, Any], *,
    dtype: str = "float32", dropout: float = 0.0, max_length: int = 512, new_tokens: int | None = None,
) -> Recipe:  # fmt: skip
    return parse_recipe(
        {
            "model": model,
            "dtype": dtype,
            "task": {
                "kind": "completion", "data": data, "prompt": "Question: {question}\nAnswer:",
                "completion": " {answer}", "max_length": max_length,
                "answer": r"(?:####|answer is:?)\s*\$?(.+)", "max_new_tokens": new_tokens or max_length,
            },
            "method": {
                "name": "lora", "rank": MATHEMATICS_RANK, "alpha": 16, "dropout": dropout,
                # Not the vision tower, whose projections have the same names.
                "target_modules": rf"(?!.*vision).*\.({'|'.join(TARGETS)})",
            },
            "training": training,
            "score_batch_size": 16,
            "output": str(setting.folder / name / "run"),
        }
    )  # fmt: skip


EXPERIMENTS = (Table3,)
