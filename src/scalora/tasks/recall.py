"""Recall of new facts: pairs of random keys and values, which no model can know and only weights can hold.

All pairs are trained on, and recall is measured on pairs that were: nothing can be generalised from one random value
to another, so held-out pairs would measure nothing. A learning rate that is chosen by the very pairs that are reported
would be favoured by chance, though. So the first half of the pairs is the validation split and the second half the test
split: rates are chosen on the one, results are of the other. The test of the MoRA paper (arXiv 2405.12130, §3) is of
this kind.
"""

from __future__ import annotations

import math
import random
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from ..common.errors import ScaloraError
from .completion import examples, token_logprobs
from .data.rows import DataSpec, PlacedRow, Splits
from .encoding import Pair, encode, truncate_prompts
from .task import BaseTaskSpec, Prediction, Score, Split, Task, TokenDataset
from .template import Template

_ALPHABETS = {"letters": "abcdefghijklmnopqrstuvwxyz", "hex": "0123456789abcdef", "digits": "0123456789"}
_SOURCE = "random pairs"


class RecallSpec(BaseTaskSpec, frozen=True):
    """Recall the value of each of `pairs` keys; keys are distinct, and the same `seed` gives the same pairs."""

    kind: Literal["recall"] = "recall"
    data: DataSpec = DataSpec(train=_SOURCE, validation=_SOURCE, test=_SOURCE)
    """Not to be given: the pairs are made on the spot."""
    pairs: int = Field(default=256, ge=2)
    alphabet: Literal["letters", "hex", "digits"] = "hex"
    key_length: int = Field(default=12, ge=1, le=1000)
    value_length: int = Field(default=12, ge=1, le=1000)
    seed: int = 0
    prompt: str = "{key}->"
    """A template with the field {key}; the value follows it."""
    max_length: int = Field(default=512, ge=2)

    @model_validator(mode="after")
    def _possible(self) -> RecallSpec:
        if self.data != type(self).model_fields["data"].default:
            raise ValueError("data was given, but recall makes its own pairs: leave it out")
        keys = len(_ALPHABETS[self.alphabet]) ** self.key_length
        if self.pairs > keys:
            raise ValueError(
                f"pairs is {self.pairs}, but there are only {keys} keys of {self.key_length} {self.alphabet}: lower it "
                "or raise key_length"
            )
        return self


class RecallTask(Task):
    """Loss is on the value's tokens and the end-of-text token after them; score on the value's alone."""

    Spec = RecallSpec
    head = "causal-lm"
    spec: RecallSpec

    def __init__(self, spec: RecallSpec) -> None:
        super().__init__(spec)
        self.prompt = Template("task.prompt", spec.prompt)
        if self.prompt.columns != ("key",):
            raise ScaloraError(f"task.prompt is {spec.prompt!r}: it must have the field {{key}}, and no other")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("key", "value")

    @cached_property
    def splits(self) -> Splits:
        spec, draw = self.spec, random.Random(self.spec.seed)

        def text(length: int) -> str:
            return "".join(draw.choices(_ALPHABETS[spec.alphabet], k=length))

        pairs: dict[str, str] = {}
        while len(pairs) < spec.pairs:
            pairs.setdefault(text(spec.key_length), text(spec.value_length))
        rows = [
            PlacedRow({"key": key, "value": value}, f"pair {number}")
            for number, (key, value) in enumerate(pairs.items(), 1)
        ]
        half = len(rows) // 2
        return Splits(rows, rows[:half], rows[half:])

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        if tokenizer.eos_token_id is None:
            raise ScaloraError("task.kind is 'recall', but the tokenizer has no eos token to end a value with")
        pairs, truncated = self._pairs(tokenizer, split)
        return examples([(prompt, [*value, tokenizer.eos_token_id]) for prompt, value in pairs], truncated)

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """`nll`: nats per token of the values; `exact_recall`: the share of values that the model recalls.

        It does where no token is likelier than the value's own, after the key and the value's true beginning. A model
        that writes by itself, greedily, writes the same values: up to its first mistake it has read nothing else.
        """
        pairs, truncated = self._pairs(tokenizer, split)
        found = token_logprobs(
            model, tokenizer, pairs, batch_size=batch_size, autocast=autocast, progress=progress, best=True
        )
        predictions = [
            Prediction(self.prompt(row), row["value"], None, math.exp(logprobs[:, 0].mean().item()))
            for row, logprobs in zip(self.rows(split), found, strict=True)
        ]
        recalled = [bool((logprobs[:, 0] == logprobs[:, 1]).all()) for logprobs in found]
        metrics = {
            "nll": -torch.cat(found)[:, 0].double().mean().item(),
            "exact_recall": sum(recalled) / len(recalled),
        }
        return Score(metrics, "nll", predictions, truncated)

    def _pairs(self, tokenizer: Any, split: Split) -> tuple[list[Pair], int]:
        rows = self.rows(split)
        pairs = encode(tokenizer, [(self.prompt(row), row["value"]) for row in rows], rows)
        return truncate_prompts(pairs, self.spec.max_length - 1, rows)


TASKS = (RecallTask,)
