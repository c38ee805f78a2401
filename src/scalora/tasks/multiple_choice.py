"""Choosing among texts by their likelihood under a causal language model."""

from __future__ import annotations

from itertools import chain
from typing import Any, Literal

import torch
from pydantic import Field

from ..common.errors import ScaloraError
from .completion import examples, token_logprobs
from .data.rows import PlacedRow
from .data.values import flaw, label_key, lookalike, number, shown
from .encoding import Pair, encode, truncate_prompts
from .harness import GIVEN_ROWS, HarnessScore, Question, evaluate
from .task import BaseTaskSpec, Prediction, Score, Split, Task, TokenDataset
from .template import Template


class MultipleChoiceSpec(BaseTaskSpec, frozen=True):
    """Which of some texts belongs after `prompt`.

    A choice is scored as it stands, so it brings its own leading space (" yes"), unless the prompt ends in one.
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    prompt: str
    choices: list[str] | None = None
    """The same choices for every row; None takes them from the column `choices`."""
    continuation: str | None = None
    """What is trained on and scored instead of the choice, which then is in the prompt as {choice}: how likely each
    choice makes the text after it."""
    answer: str = "answer"
    """The column with the right choice: its index from 0, or its text."""
    max_length: int = Field(default=512, ge=2)
    normalize: Literal["none", "length", "choice-tokens"] = "none"
    """What a choice's log-likelihood is divided by before choices are compared: nothing, its characters, its tokens."""
    harness: str | None = None
    """Let lm-evaluation-harness score: 'rows' by its scoring of these rows, or the test split by a task of its own from
    the hub (arc_easy, …; other splits then as 'rows')."""


class MultipleChoiceTask(Task):
    """Trained on the tokens of the right choice; scored by which choice is the likeliest."""

    Spec = MultipleChoiceSpec
    head = "causal-lm"
    spec: MultipleChoiceSpec

    def __init__(self, spec: MultipleChoiceSpec) -> None:
        if spec.choices is not None and len(set(spec.choices)) < max(2, len(spec.choices)):
            raise ScaloraError(f"task.choices is {spec.choices}: give two or more different choices")
        super().__init__(spec)
        self.prompt = Template("task.prompt", spec.prompt)
        self.continuation = None if spec.continuation is None else Template("task.continuation", spec.continuation)
        if spec.harness and spec.normalize == "choice-tokens":
            raise ScaloraError(
                "task.normalize is 'choice-tokens', which lm-evaluation-harness has not: use 'length' or 'none'"
            )
        if self.continuation and "choice" not in self.prompt.columns:
            raise ScaloraError(f"task.prompt is {spec.prompt!r}: with a continuation it must hold {{choice}}")

    @property
    def columns(self) -> tuple[str, ...]:
        choices = () if self.spec.choices else ("choices",)
        prompt = self.prompt.columns
        if self.continuation:
            prompt = (*(name for name in prompt if name != "choice"), *self.continuation.columns)
        return tuple(dict.fromkeys((*prompt, self.spec.answer, *choices)))

    def check(self, row: PlacedRow) -> None:
        for template in (self.prompt, self.continuation):
            if template is not None:
                template.check(row, keep_missing=self.data.missing == "keep")
        self._answer(row, self._choices(row))

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        read = self._encode(tokenizer, split)
        right = [
            pairs[self._answer(row, self._choices(row))] for pairs, row in zip(read, self.rows(split), strict=True)
        ]
        dataset = examples(*truncate_prompts(right, self.spec.max_length))
        scored = max(len(prompt) + len(following) - 1 for pairs in read for prompt, following in pairs)
        dataset.longest = max(dataset.longest, min(self.spec.max_length, scored))
        return dataset

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """Metrics of the choices' likelihoods given the prompt.

        `accuracy`: share of rows whose likeliest choice is the right one. `nll`: mean over rows of minus the right
        choice's log-probability among the choices, all after normalising. `answer_nll`: minus the mean log-likelihood
        of a token of the right choice, over all such tokens.
        """
        read = [] if self.spec.harness else self._encode(tokenizer, split)
        rows = self.rows(split)
        choices = [self._choices(row) for row in rows]
        answers = [self._answer(row, texts) for row, texts in zip(rows, choices, strict=True)]
        texts = [self._texts(row, own) for row, own in zip(rows, choices, strict=True)]
        if self.spec.harness:
            name = self.spec.harness if split == "test" else GIVEN_ROWS
            questions = [Question(each, answer) for each, answer in zip(texts, answers, strict=True)]
            score = evaluate(
                model, tokenizer, name, questions, batch_size=batch_size, max_length=self.spec.max_length,
                autocast=autocast,
            )  # fmt: skip
            return self._of_harness(score, rows, choices, answers if name == GIVEN_ROWS else [])
        pairs, truncated = truncate_prompts(list(chain.from_iterable(read)), self.spec.max_length)
        found = token_logprobs(model, tokenizer, pairs, batch_size=batch_size, autocast=autocast, progress=progress)

        correct, nll, predictions, right_tokens = 0, 0.0, [], []
        start = 0
        for row, own, asked, answer in zip(rows, choices, texts, answers, strict=True):
            logprobs = found[start : start + len(own)]
            start += len(own)
            scores = [self._compared(text, each) for (_, text), each in zip(asked, logprobs, strict=True)]
            among = torch.stack(scores).log_softmax(0)
            best = int(among.argmax())
            correct += best == answer
            nll -= among[answer].item()
            right_tokens.append(logprobs[answer])
            prompt = self.prompt({"choice": "_", **row})
            predictions.append(Prediction(prompt, own[answer].strip(), own[best].strip(), among[best].exp().item()))
        metrics = {
            "accuracy": correct / len(rows),
            "nll": nll / len(rows),
            "answer_nll": -torch.cat(right_tokens).double().mean().item(),
        }
        return Score(metrics, "accuracy", predictions, truncated)

    def _of_harness(
        self, score: HarnessScore, rows: list[PlacedRow], choices: list[list[str]], answers: list[int]
    ) -> Score:
        """The harness's metrics; predictions only of our own rows, whose answers are given."""
        # What is scored after a {choice} in the prompt is the same text for all of them.
        by_length = self.spec.normalize == "length" and self.continuation is None
        metrics = {"accuracy": score.acc_norm if by_length else score.acc}
        metrics |= {"acc": score.acc, "acc_norm": score.acc_norm}
        predictions = []
        for row, own, answer, found in zip(rows, choices, answers, score.loglikelihoods, strict=False):
            lengths = [len(text) for _, text in self._texts(row, own)]
            scores = torch.tensor(found).double() / (torch.tensor(lengths) if self.spec.normalize == "length" else 1)
            among = scores.log_softmax(0)
            best = int(among.argmax())
            prompt = self.prompt({"choice": "_", **row})
            predictions.append(Prediction(prompt, own[answer].strip(), own[best].strip(), among[best].exp().item()))
            metrics["nll"] = metrics.get("nll", 0.0) - among[answer].item() / len(rows)
        return Score(metrics, "accuracy", predictions)

    def _texts(self, row: PlacedRow, choices: list[str]) -> list[tuple[str, str]]:
        """For each choice, what the model is given and what is scored after it."""
        if self.continuation is None:
            prompt = self.prompt(row)
            return [(prompt, choice) for choice in choices]
        following = self.continuation(row)
        return [(self.prompt({**row, "choice": choice}), following) for choice in choices]

    def _encode(self, tokenizer: Any, split: Split) -> list[list[Pair]]:
        """Token ids of each row's choices, of the rows that fit.

        Raises:
            ScaloraError: the tokenizer cannot tell two choices apart.
        """
        read = self.read_together(split, lambda rows: self._read(tokenizer, rows))
        needed = [1 + max(len(following) for _, following in own) for own in read]
        return [read[number] for number in self.fitting(split, needed, self.spec.max_length)]

    def _read(self, tokenizer: Any, rows: list[PlacedRow]) -> list[list[Pair]]:
        texts = [self._texts(row, self._choices(row)) for row in rows]
        owners = [row for row, own in zip(rows, texts, strict=True) for _ in own]
        pairs = iter(encode(tokenizer, list(chain.from_iterable(texts)), owners))
        read = [[next(pairs) for _ in own] for own in texts]
        for own, given, row in zip(read, texts, rows, strict=True):
            for pair, text in zip(own, given, strict=True):
                if (other := given[own.index(pair)]) != text:
                    raise ScaloraError(
                        f"task: the tokenizer makes the same of the choices {''.join(other)[-60:]!r} and "
                        f"{''.join(text)[-60:]!r} in {row.place}: give different ones"
                    )
        return read

    def _compared(self, text: str, logprobs: torch.Tensor) -> torch.Tensor:
        divisor = {"none": 1, "length": len(text), "choice-tokens": len(logprobs)}[self.spec.normalize]
        return logprobs.double().sum() / divisor

    def _choices(self, row: PlacedRow) -> list[str]:
        choices = self.spec.choices or row["choices"]
        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(each, str) and each and not flaw(each) for each in choices)
        ):
            raise ScaloraError(
                f"task.data.columns: the column choices must hold a list of two or more texts, found {shown(choices)} "
                f"in {row.place}; map it to such a column, or set task.choices"
            )
        return choices

    def _answer(self, row: PlacedRow, choices: list[str]) -> int:
        """The index of the right choice. A text is compared with the choices first, and only then read as an index."""
        value = row[self.spec.answer]
        if isinstance(value, str | bool):
            # As an index, true would be the second choice, whatever that says.
            stripped = [label_key(choice) if isinstance(value, bool) else choice.strip() for choice in choices]
            wanted = label_key(value) if isinstance(value, bool) else value.strip()
            if stripped.count(wanted) > 1:
                raise ScaloraError(
                    f"task.answer: {shown(value)} in column {self.spec.answer!r} is more than one of the choices "
                    f"{shown(choices, 300)} in {row.place}; give its index, or different choices"
                )
            if wanted in stripped:
                return stripped.index(wanted)
        index = number(value)
        if index is not None and index.is_integer() and 0 <= index < len(choices):
            return int(index)
        raise ScaloraError(
            f"task.answer: {shown(value)} in column {self.spec.answer!r} is neither an index from 0 to "
            f"{len(choices) - 1} nor one of the choices {shown(choices, 300)} in {row.place}"
            + lookalike(value, choices)
        )


TASKS = (MultipleChoiceTask,)
