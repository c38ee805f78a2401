"""Completing a prompt: the likelihood of given texts under a causal language model."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from ..common.errors import ScaloraError
from .data.rows import PlacedRow
from .generation import extract, generate
from .task import BaseTaskSpec, Prediction, Progress, Score, Split, Task, TokenDataset, batches, evaluating
from .template import Template

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt (never empty) and of what follows it (never empty)."""


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

    def check(self, row: PlacedRow) -> None:
        for template in (self.prompt, self.completion):
            template.check(row, keep_missing=self.data.missing == "keep")

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        return examples(*self._pairs(tokenizer, split))

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
            model, tokenizer, [prompt for prompt, _ in pairs], max_new_tokens=self.spec.max_new_tokens,
            batch_size=batch_size, autocast=autocast, progress=progress,
        )  # fmt: skip
        wanted = [self._reference(p.expected) for p in predictions]
        right = [extract(self.answer, text) == answer for text, answer in zip(written, wanted, strict=True)]
        predictions = [
            replace(p, predicted=text, probability=None) for p, text in zip(predictions, written, strict=True)
        ]
        return Score({"exact_match": sum(right) / len(right), **metrics}, "exact_match", predictions, truncated)

    def _reference(self, completion: str) -> str:
        assert self.answer is not None
        found = extract(self.answer, completion)
        if found is None:
            raise ScaloraError(
                f"task.answer: {self.spec.answer!r} finds nothing in the completion {completion[-80:]!r}"
            )
        return found

    def _pairs(self, tokenizer: Any, split: Split) -> tuple[list[Pair], int]:
        if tokenizer.eos_token_id is None:
            raise ScaloraError("task.kind is 'completion', but the tokenizer has no eos token to end a completion with")
        texts = [(self.prompt(row), self.completion(row)) for row in self.rows(split)]
        ended = [(prompt, [*following, tokenizer.eos_token_id]) for prompt, following in encode(tokenizer, texts)]
        return truncate_prompts(ended, self.spec.max_length)


def encode(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Token ids of (prompt, following text) pairs, cut where lm-evaluation-harness cuts them.

    Both are tokenised together and the prompt alone; what the whole has more is the following text's. Spaces at the
    prompt's end go to the following text, since most tokenizers join a space to the word after it.

    Raises:
        ScaloraError: a following text adds no token to its prompt.
    """
    prompts = [prompt.rstrip() for prompt, _ in texts]
    wholes = tokenizer([prompt + following for prompt, following in texts])["input_ids"]
    distinct = list(dict.fromkeys(prompts))
    ids = dict(zip(distinct, tokenizer(distinct)["input_ids"], strict=True)) if distinct else {}
    pairs = []
    for prompt, whole, (_, text) in zip(prompts, wholes, texts, strict=True):
        following = list(whole[len(ids[prompt]) :])
        if not following:
            reason = "runs into the prompt's last word: begin it with a space" if text.strip() else "may not be empty"
            raise ScaloraError(f"task: the text {text!r} after the prompt {prompt[-60:]!r} adds no token; it {reason}")
        # The first token needs something before it to be predicted from.
        pairs.append((list(ids[prompt]) or [_start(tokenizer)], following))
    return pairs


def _start(tokenizer: Any) -> int:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ScaloraError(
            "task.prompt is empty and the tokenizer has no bos or eos token to start from; give a prompt"
        )
    return start


def truncate_prompts(pairs: Sequence[Pair], max_length: int) -> tuple[list[Pair], int]:
    """Prompts cut on the left, so that pairs are at most `max_length` tokens long; and how many were cut.

    Raises:
        ScaloraError: a following text leaves no room for even one token of its prompt.
    """
    fitting, truncated = [], 0
    for prompt, following in pairs:
        room = max_length - len(following)
        if room < 1:
            raise ScaloraError(
                f"task.max_length is {max_length}, but an answer has {len(following)} tokens; "
                f"set it to {len(following) + 1} or more"
            )
        truncated += len(prompt) > room
        fitting.append((prompt[-room:], following))
    return fitting, truncated


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
) -> list[torch.Tensor]:
    """The log-probability of each following token: a float32 tensor `[tokens]` on the CPU for every pair.

    Pairs that make the model read the same tokens share one sequence: choices of one token each, after one prompt,
    differ only in what is looked up in the last logits.
    """
    readers: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, following) in enumerate(pairs):
        readers.setdefault((*prompt, *following[:-1]), []).append(index)
    inputs = list(readers)
    kept = [max(len(pairs[i][1]) for i in readers[ids]) for ids in inputs]
    found: dict[int, torch.Tensor] = {}
    done = 0
    with evaluating(model, autocast) as device:
        for batch in batches([len(ids) for ids in inputs], kept, batch_size):
            keep = max(kept[b] for b in batch)
            logits = _last_logits(model, [inputs[b] for b in batch], keep, tokenizer.pad_token_id, device)
            for b, row in zip(batch, logits, strict=True):
                scores = row[keep - kept[b] :].float()
                scores = scores - scores.logsumexp(-1, keepdim=True)
                for index in readers[inputs[b]]:
                    wanted = torch.tensor(pairs[index][1], device=device)
                    found[index] = scores[-len(wanted) :].gather(-1, wanted[:, None]).squeeze(-1)
            done += len(batch)
            if progress:
                progress(done, len(inputs))
    # One copy from the device for all, in the pairs' order.
    ordered = torch.cat([found[i] for i in range(len(pairs))]).cpu()
    return list(ordered.split([len(following) for _, following in pairs]))


def _last_logits(model: Any, rows: Sequence[Sequence[int]], keep: int, pad: int, device: torch.device) -> torch.Tensor:
    """Logits `[rows, keep, vocabulary]` at the last positions.

    Padding is on the left, so that the last positions are the same in every row and no others need logits; positions
    are then counted from each row's first real token, as if there was no padding.
    """
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = (torch.arange(length, device=device) >= length - lengths[:, None]).long()
    options = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "logits_to_keep": keep, "use_cache": False}
    # A PEFT model hands its arguments on to the model inside. Not every model knows every option: BLOOM, say, finds
    # positions from the mask by itself.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inner.forward).parameters
    known_options = {name: value for name, value in options.items() if name in known}
    return model(input_ids=ids, attention_mask=mask, **known_options).logits[:, -keep:]


TASKS = (CompletionTask,)
