"""Completing a prompt: the likelihood of given texts under a causal language model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field

from ..common import processes
from ..common.errors import ScaloraError
from .data.rows import PlacedRow
from .encoding import Pair, encode, encode_prompts, truncate_prompts
from .generation import extract, generate
from .padding import last_logits, reads_alike
from .scoring import Progress, batches, by_row, evaluating
from .task import BaseTaskSpec, Prediction, Score, Split, Task, TokenDataset
from .template import Template


class CompletionSpec(BaseTaskSpec, frozen=True):
    """Write `completion` after `prompt`, both templates with {column} fields."""

    kind: Literal["completion"] = "completion"
    prompt: str
    completion: str
    max_length: int = Field(default=512, ge=2)
    answer: str | None = None
    """A regular expression that finds the answer in a completion (its last match's first group): then `exact_match`,
    the share of rows where the model, writing by itself, arrives at the reference's answer, is measured and counts."""
    max_new_tokens: int = Field(default=256, ge=1)


class CompletionTask(Task):
    """Loss and score are on the completion's tokens and the end-of-text token after them."""

    Spec = CompletionSpec
    head = "causal-lm"
    spec: CompletionSpec

    def __init__(self, spec: CompletionSpec) -> None:
        super().__init__(spec)
        self.prompt = Template("task.prompt", spec.prompt)
        self.completion = Template("task.completion", spec.completion)
        try:
            self.answer = None if spec.answer is None else re.compile(spec.answer)
        except re.error as error:
            raise ScaloraError(f"task.answer: {spec.answer!r} is no regular expression ({error})") from error

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.prompt.columns, *self.completion.columns)))

    @property
    def max_written(self) -> int | None:
        return None if self.answer is None else self.spec.max_new_tokens

    def check(self, row: PlacedRow) -> None:
        for template in (self.prompt, self.completion):
            template.check(row, keep_missing=self.data.missing == "keep")

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        pairs, truncated = self._pairs(tokenizer, split)
        dataset = examples(pairs, truncated)
        if self.answer is not None and split != "train":
            dataset.longest_prompt = max(map(len, self._prompts(tokenizer, split, pairs)))
        return dataset

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """`nll`: minus the mean log-likelihood (nats) of a completion token, over all tokens of the split.

        With `answer`, `exact_match` too.
        """
        pairs, truncated = self._pairs(tokenizer, split)
        found = token_logprobs(model, tokenizer, pairs, batch_size=batch_size, autocast=autocast, progress=progress)
        predictions = [
            Prediction(self.prompt(row), self.completion(row), None, math.exp(logprobs.mean().item()))
            for row, logprobs in zip(self.rows(split), found, strict=True)
        ]
        metrics = {"nll": -torch.cat(found).double().mean().item()}
        if self.answer is None:
            return Score(metrics, "nll", predictions, truncated)
        written = generate(
            model, tokenizer, self._prompts(tokenizer, split, pairs), max_new_tokens=self.spec.max_new_tokens,
            batch_size=batch_size, autocast=autocast, progress=progress,
        )  # fmt: skip
        wanted = [self._reference(row) for row in self.rows(split)]
        right = [extract(self.answer, text) == answer for text, answer in zip(written, wanted, strict=True)]
        predictions = [
            replace(p, predicted=text, probability=None) for p, text in zip(predictions, written, strict=True)
        ]
        return Score({"exact_match": sum(right) / len(right), **metrics}, "exact_match", predictions, truncated)

    def _reference(self, row: PlacedRow) -> str:
        assert self.answer is not None
        completion = self.completion(row)
        found = extract(self.answer, completion)
        if found is None:
            raise ScaloraError(
                f"task.answer: {self.spec.answer!r} finds nothing in the completion {completion[-80:]!r} of "
                f"{row.place}; mend or drop the row"
            )
        return found

    def _pairs(self, tokenizer: Any, split: Split) -> tuple[list[Pair], int]:
        if tokenizer.eos_token_id is None:
            raise ScaloraError("task.kind is 'completion', but the tokenizer has no eos token to end a completion with")
        if self.answer is not None and split != "train":
            self.read_rows(split, self._reference)

        def read(rows: list[PlacedRow]) -> list[Pair]:
            return encode(tokenizer, [(self.prompt(row), self.completion(row)) for row in rows], rows)

        pairs = self.read_together(split, read)
        ended = [(prompt, [*following, tokenizer.eos_token_id]) for prompt, following in pairs]
        fits = self.fitting(split, [1 + len(following) for _, following in ended], self.spec.max_length)
        return truncate_prompts([ended[number] for number in fits], self.spec.max_length)

    def _prompts(self, tokenizer: Any, split: Split, pairs: list[Pair]) -> list[list[int]]:
        """What is written on: whole prompts, cut where a row is too long with the end that it has in training."""
        prompts = encode_prompts(tokenizer, [self.prompt(row) for row in self.rows(split)])
        whole = [(prompt, following) for prompt, (_, following) in zip(prompts, pairs, strict=True)]
        return [prompt for prompt, _ in truncate_prompts(whole, self.spec.max_length)[0]]


def examples(pairs: Sequence[Pair], truncated: int) -> TokenDataset:
    """Training examples with the loss on what follows the prompt."""
    rows = [{"input_ids": p + f, "labels": [-100] * len(p) + f} for p, f in pairs]
    return TokenDataset(rows, truncated)


def token_logprobs(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    autocast: torch.dtype | None,
    progress: Progress | None,
    best: bool = False,
) -> list[torch.Tensor]:
    """The log-probability of each following token: a float32 tensor `[tokens]` on the CPU for every pair.

    With `best` it is `[tokens, 2]`: beside each stands that of the likeliest token at its place.

    Pairs that make the model read the same tokens share one sequence: choices of one token each, after one prompt,
    differ only in what is looked up in the last logits. A model that reads a row otherwise beside longer ones gets
    one row at a time.
    """
    readers: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, following) in enumerate(pairs):
        readers.setdefault((*prompt, *following[:-1]), []).append(index)
    inputs = list(readers)
    kept = [max(len(pairs[i][1]) for i in readers[ids]) for ids in inputs]
    found: dict[int, torch.Tensor] = {}
    pad = tokenizer.pad_token_id
    with evaluating(model, autocast) as device:
        probe = partial(_short_logits, model, device)
        if batch_size > 1 and not reads_alike(probe, inputs, pad, autocast or model.dtype):
            batch_size = 1

        def read(batch: list[int]) -> list[dict[int, torch.Tensor]]:
            keep, read = max(kept[b] for b in batch), [{} for _ in batch]
            logits = last_logits(model, [inputs[b] for b in batch], keep, pad, device)
            for b, row, of_row in zip(batch, logits, read, strict=True):
                scores = row[keep - kept[b] :].float()
                scores = scores - scores.logsumexp(-1, keepdim=True)
                for index in readers[inputs[b]]:
                    wanted = torch.tensor(pairs[index][1], device=device)
                    own = scores[-len(wanted) :]
                    chosen = own.gather(-1, wanted[:, None])
                    own = torch.cat((chosen, own.amax(-1, True)), -1) if best else chosen.squeeze(-1)
                    of_row[index] = own if processes.count() == 1 else own.cpu()
            return read

        parts = list(batches([len(ids) for ids in inputs], kept, batch_size))
        for of_row in by_row(parts, read, progress):
            found |= of_row
    # One copy from the device for all, in the pairs' order.
    ordered = torch.cat([found[i] for i in range(len(pairs))]).cpu()
    return list(ordered.split([len(following) for _, following in pairs]))


def _short_logits(model: Any, device: torch.device, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """Logits `[rows, shortest, vocabulary]` at as many positions as the shortest row has."""
    return last_logits(model, rows, min(len(row) for row in rows), pad, device)


TASKS = (CompletionTask,)
