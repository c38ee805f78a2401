"""Texts for texts, from an encoder and a decoder: summaries, translations, answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field

from ..common.errors import ScaloraError
from .classification import column_or_template
from .data.rows import PlacedRow
from .examples import TokenDataset
from .generation import greedily, refusing_generation
from .scoring import Progress, batches, by_row, evaluating
from .task import BaseTaskSpec, Prediction, Score, Split, Task

_ROUGE = ("rouge1", "rouge2", "rougeL")


class Seq2SeqSpec(BaseTaskSpec, frozen=True):
    """Write `target` when `input` is read: each a column's name or a template with {column} fields."""

    kind: Literal["seq2seq"] = "seq2seq"
    input: str = "input"
    target: str = "target"
    prefix: str = ""
    """What stands before every input, as "summarize: " does for T5."""
    metric: Literal["rouge1", "rouge2", "rougeL", "nll"] = "rougeL"
    """What counts; with nll the model is not made to write."""
    max_length: int = Field(default=512, ge=2)
    """Tokens of an input; longer ones are cut on the right."""
    max_target_length: int = Field(default=128, ge=2)
    """Tokens of a target; rows with longer ones are left out."""
    max_new_tokens: int = Field(default=128, ge=1)


class Seq2SeqTask(Task):
    """Loss and score are on the target's tokens, with what the tokenizer puts around it, or the token that ends it."""

    Spec = Seq2SeqSpec
    head = "seq2seq-lm"
    spec: Seq2SeqSpec

    def __init__(self, spec: Seq2SeqSpec) -> None:
        super().__init__(spec)
        self.input = column_or_template("task.input", spec.input)
        self.target = column_or_template("task.target", spec.target)
        if spec.metric != "nll":
            rouge_scorer()

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.input.columns, *self.target.columns)))

    @property
    def max_written(self) -> int | None:
        return None if self.spec.metric == "nll" else self.spec.max_new_tokens

    def check(self, row: PlacedRow) -> None:
        for template in (self.input, self.target):
            template.check(row, keep_missing=self.data.missing == "keep")

    def collator(self, tokenizer: Any, model: Any = None) -> Any:
        return Seq2SeqCollator(tokenizer.pad_token_id)

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        examples, truncated = self._encode(tokenizer, split)
        dataset = TokenDataset(examples, truncated)
        dataset.longest = max(dataset.longest, *(len(example["labels"]) for example in examples))
        dataset.longest_prompt = 1  # the token that a decoder starts from
        return dataset

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """`nll`: minus the mean log-likelihood (nats) of a target's token, over all tokens of the split.

        Where ROUGE counts, the model writes greedily, and `rouge1`, `rouge2` and `rougeL` are the means over rows of
        their F-measures, from 0 to 1, by Google's rouge_score with its stemmer.
        """
        examples, truncated = self._encode(tokenizer, split)
        found = target_logprobs(
            model, self.collator(tokenizer), examples, batch_size=batch_size, autocast=autocast, progress=progress
        )
        predictions = [
            Prediction(self._source(row), self.target(row), None, math.exp(logprobs.mean().item()))
            for row, logprobs in zip(self.rows(split), found, strict=True)
        ]
        metrics = {"nll": -torch.cat(found).mean().item()}
        if self.spec.metric == "nll":
            return Score(metrics, "nll", predictions, truncated)
        written = self._write(model, tokenizer, examples, batch_size, autocast, progress)
        predictions = [
            replace(p, predicted=text, probability=None) for p, text in zip(predictions, written, strict=True)
        ]
        scorer = rouge_scorer()
        scores = [scorer.score(p.expected, text) for p, text in zip(predictions, written, strict=True)]
        metrics = {name: sum(each[name].fmeasure for each in scores) / len(scores) for name in _ROUGE} | metrics
        return Score(metrics, self.spec.metric, predictions, truncated)

    def _write(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[dict[str, Any]],
        batch_size: int,
        autocast: torch.dtype | None,
        progress: Progress | None,
    ) -> list[str]:
        """What the model writes for each example, greedily."""
        collate, greedy = self.collator(tokenizer), greedily(model, tokenizer)
        lengths = [len(example["input_ids"]) for example in examples]
        with evaluating(model, autocast) as device, refusing_generation("task.metric", "set it to nll"):

            def written(batch: list[int]) -> list[str]:
                inputs = collate([examples[i] for i in batch])
                found = model.generate(
                    input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device),
                    max_new_tokens=self.spec.max_new_tokens, min_length=0, **greedy,
                )  # fmt: skip
                return tokenizer.batch_decode(found, skip_special_tokens=True)

            return by_row(list(batches(lengths, [1] * len(lengths), batch_size)), written, progress)

    def _source(self, row: PlacedRow) -> str:
        return self.spec.prefix + self.input(row)

    def _encode(self, tokenizer: Any, split: Split) -> tuple[list[dict[str, Any]], int]:
        """Of each row that fits what is read and what is written; and how many inputs are cut."""
        if tokenizer.eos_token_id is None:
            raise ScaloraError("task.kind is 'seq2seq', but the tokenizer has no eos token to end a target with")
        read = self.read_rows(split, lambda row: self._example(tokenizer, row))
        field = "task.max_target_length"
        needed = [len(example["labels"]) for example, _ in read]
        kept = [read[i] for i in self.fitting(split, needed, self.spec.max_target_length, field)]
        self._tell_unknown(tokenizer, split, [example["labels"] for example, _ in kept])
        if self.spec.metric != "nll":
            self._tell_unread(split)
        return [example for example, _ in kept], sum(cut for _, cut in kept)

    def _example(self, tokenizer: Any, row: PlacedRow) -> tuple[dict[str, Any], bool]:
        whole = tokenizer(self._source(row))["input_ids"]
        ids = tokenizer(self._source(row), truncation=True, max_length=self.spec.max_length)["input_ids"]
        labels = list(tokenizer(text_target=self.target(row))["input_ids"])
        added = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        for field, found in (("input", ids), ("target", labels)):
            if not set(found) - added:
                raise ScaloraError(f"task.{field}: the text has no tokens in {row.place}; mend or drop the row")
        if labels[-1] not in added:
            labels.append(tokenizer.eos_token_id)
        return {"input_ids": list(ids), "labels": labels}, len(whole) > len(ids)

    def _tell_unknown(self, tokenizer: Any, split: Split, targets: Sequence[list[int]]) -> None:
        unknown = tokenizer.unk_token_id
        lost = [row for row, ids in zip(self.rows(split), targets, strict=True) if unknown in ids]
        if unknown is not None and lost:
            self.tell(
                f"task.target: the tokenizer has no tokens for parts of {len(lost)} of {len(targets)} {split} targets, "
                f"of which the model learns {tokenizer.unk_token}: the first is in {lost[0].place}"
            )

    def _tell_unread(self, split: Split) -> None:
        unread = [row for row in self.rows(split) if not re.search("[a-z0-9]", self.target(row).lower())]
        if unread:
            self.tell(
                f"task.metric: ROUGE reads Latin letters and digits alone, of which {len(unread)} of "
                f"{len(self.rows(split))} {split} targets have none, so that they score 0: the first is in "
                f"{unread[0].place}"
            )


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Batches of `input_ids` and `attention_mask` `[batch, read]`, and `labels` `[batch, written]`, padded behind."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }


def target_logprobs(
    model: Any,
    collate: Seq2SeqCollator,
    examples: Sequence[dict[str, Any]],
    *,
    batch_size: int,
    autocast: torch.dtype | None,
    progress: Progress | None,
) -> list[torch.Tensor]:
    """The log-probability of each token of a target: a float64 tensor `[tokens]` on the CPU for every example."""
    lengths, written = ([len(example[key]) for example in examples] for key in ("input_ids", "labels"))
    with evaluating(model, autocast) as device:

        def read(batch: list[int]) -> list[torch.Tensor]:
            inputs = {k: v.to(device) for k, v in collate([examples[i] for i in batch]).items()}
            logprobs = model(**inputs).logits.float().log_softmax(-1)
            chosen = logprobs.gather(-1, inputs["labels"].clamp(min=0)[..., None]).squeeze(-1).double().cpu()
            return [row[: written[i]] for i, row in zip(batch, chosen, strict=True)]

        return by_row(list(batches(lengths, written, batch_size)), read, progress)


def rouge_scorer() -> Any:
    """Google's scorer, with its stemmer as summaries are scored; raises ScaloraError where it is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ScaloraError(
            "task.metric: ROUGE needs rouge_score: pip install 'scalora[rouge]', or set task.metric to nll"
        ) from error
    return RougeScorer(list(_ROUGE), use_stemmer=True)


TASKS = (Seq2SeqTask,)
