"""Multiple choice scored by lm-evaluation-harness: by a task of its own from the hub, or its scoring on given rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import ScaloraError

GIVEN_ROWS = "rows"  # as the name of a task: the rows at hand


@dataclass(frozen=True)
class Question:
    """One row: (context, continuation) per choice, and the right one's index."""

    texts: Sequence[tuple[str, str]]
    answer: int


@dataclass(frozen=True)
class HarnessScore:
    """``acc`` compares log-likelihoods, ``acc_norm`` divides them by the characters of the choice first.

    ``loglikelihoods`` has a list per row, in the rows' order.
    """

    acc: float
    acc_norm: float
    loglikelihoods: list[list[float]]


def evaluate(
    model: Any,
    tokenizer: Any,
    task: str,
    questions: Sequence[Question],
    *,
    batch_size: int,
    max_length: int,
    autocast: torch.dtype | None,
) -> HarnessScore:
    """Let the harness score a model.

    Args:
        model: a causal language model on its device; PEFT's wrapping is fine.
        tokenizer: the model's.
        task: a multiple-choice task of the harness (e.g. arc_easy), or ``GIVEN_ROWS`` for `questions`.
        questions: all of them with several contexts and one continuation (partial evaluation, as WinoGrande's), or all
            with one context and several continuations.
        batch_size: texts at a time.
        max_length: tokens; contexts are cut on the left.
        autocast: dtype to compute in, if not the model's.

    Raises:
        ScaloraError: lm-eval is not installed, or it has no such task, or the task cannot be loaded, or
            it would not read all of a text.
    """
    try:
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.evaluator import evaluate as judge
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        raise ScaloraError("task.harness needs lm-evaluation-harness: pip install 'scalora[harness]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = next(model.parameters()).device
    was_training = model.training

    base: Any = HFLM  # whose own base class hides arguments and methods from type checkers

    class Whole(base):
        """Refuses texts of which the harness would drop something where their tokens meet."""

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, after = super()._encode_pair(context, continuation)
            if before + after != self.tok_encode(context + continuation):
                raise ScaloraError(
                    f"task.harness: lm-evaluation-harness loses a part of {continuation[:60]!r} after "
                    f"{context[-60:]!r}, whose tokens run into one another; begin it with a space, or leave harness out"
                )
            return before, after

    wrapped = Whole(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, device=str(device)
    )
    try:
        # Its own tasks are found by reading some thousand files, which takes a while.
        tasks: Any = (
            {GIVEN_ROWS: ConfigurableTask(config=_config(questions))}
            if task == GIVEN_ROWS
            else get_task_dict([task], TaskManager())
        )
        with torch.autocast(device.type, dtype=autocast) if autocast else nullcontext():
            found: Any = judge(lm=wrapped, task_dict=tasks, bootstrap_iters=0, verbosity="ERROR")
    except ScaloraError:
        raise
    except Exception as error:  # the harness, its task files and the hub fail in too many ways to list
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ScaloraError(f"task.harness: {task!r} could not be evaluated ({reason})") from error
    finally:
        model.train(was_training)
    (name, results), samples = next(iter(found["results"].items())), next(iter(found["samples"].values()))
    if "acc,none" not in results:
        raise ScaloraError(f"task.harness: {name!r} is no multiple-choice task of lm-evaluation-harness")
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    likelihoods = [[float(score[0]) for score in sample["filtered_resps"]] for sample in samples]
    return HarnessScore(results["acc,none"], results.get("acc_norm,none", results["acc,none"]), likelihoods)


def _config(questions: Sequence[Question]) -> dict[str, Any]:
    """A task of the harness for these rows; nothing is added between context and continuation."""
    from datasets import Dataset

    partial = len({text for _, text in questions[0].texts}) == 1
    varying, common = (0, 1) if partial else (1, 0)
    rows = [
        {"texts": [text[varying] for text in q.texts], "rest": q.texts[0][common], "answer": q.answer}
        for q in questions
    ]
    return {
        "task": GIVEN_ROWS,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": (lambda row: row["answer"]) if partial else (lambda row: row["rest"]),
        "doc_to_target": (lambda row: row["rest"]) if partial else (lambda row: row["answer"]),
        "doc_to_choice": lambda row: row["texts"],
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
