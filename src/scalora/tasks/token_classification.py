"""Tags for words: named entities, parts of speech."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import torch
from pydantic import Field

from ..common.errors import ScaloraError
from .data.rows import PlacedRow
from .data.values import flaw, label_text, number, shown
from .entities import OUTSIDE, entity_scores, has_prefixes
from .labels import Labels, LabelTask
from .scoring import batches, by_row, evaluating
from .task import BaseTaskSpec, Collator, Prediction, Score, Split, TokenDataset


class TokenClassificationSpec(BaseTaskSpec, frozen=True):
    """Which of the tags in the column `tags` belongs to each of the words in the column `tokens`.

    Cells are lists, lists in JSON, or texts with white space between the words.
    """

    kind: Literal["token_classification"] = "token_classification"
    tokens: str = "tokens"
    tags: str = "tags"
    """IOB (B-PER, I-PER, O), or plain types; or numbers that are places in `labels`."""
    labels: list[str | bool | int] | None = None
    """All tags, in the order of the head's outputs; None takes those of train, sorted."""
    metric: Literal["f1", "accuracy"] = "f1"
    """What counts: the F1 of entities, or the share of words with the right tag."""
    max_length: int = Field(default=512, ge=2)


class TokenClassificationTask(LabelTask):
    """Cross-entropy on each word's tag, at the first token of the word."""

    Spec = TokenClassificationSpec
    head = "token-classification"
    spec: TokenClassificationSpec

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.spec.tokens, self.spec.tags)

    def read_labels(self) -> Labels:
        labels = Labels(
            self.spec.labels,
            lambda: (tag for row in self.rows("train") for tag in self._tags(row)),
            "task.tags",
            self.spec.tags,
        )
        has_prefixes(labels.names)
        if not labels.given and self.spec.metric == "f1" and all(map(_is_code, labels.names)):
            raise ScaloraError(
                f"task.tags: the tags are {', '.join(labels.names[:4])}, …, which do not say what is an entity: name "
                "them in task.labels, in the order of their numbers, or set task.metric to accuracy"
            )
        return labels

    def collator(self, tokenizer: Any, model: Any = None) -> Collator:
        return Collator(tokenizer.pad_token_id)

    def check(self, row: PlacedRow) -> None:
        words = self._cells(row, self.spec.tokens, "task.tokens")
        tags = self._cells(row, self.spec.tags, "task.tags")
        if len(words) != len(tags):
            raise ScaloraError(
                f"task.tags: {len(words)} words with {len(tags)} tags in {row.place}; mend or drop the row"
            )
        if self.spec.labels is not None:
            self._targets(row)

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        return TokenDataset([example for example, _ in self._encode(tokenizer, split)], 0)

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """`f1`, `precision` and `recall` of entities, `accuracy` of words, and `nll`: mean nats per word.

        A word of which the tokenizer makes no token is taken to be tagged O, and does not count in `nll`.
        """
        encoded = self._encode(tokenizer, split)
        prefixed = has_prefixes(self.labels)
        collate, lengths = self.collator(tokenizer), [len(example["input_ids"]) for example, _ in encoded]
        with evaluating(model, autocast) as device:

            def read(batch: list[int]) -> list[tuple[list[str], torch.Tensor]]:
                inputs = collate([encoded[i][0] for i in batch])
                labels = inputs.pop("labels")
                logits = model(**{k: v.to(device) for k, v in inputs.items()}).logits.double().cpu()
                return [
                    self._read_row(own, wanted, encoded[i][1])
                    for i, own, wanted in zip(batch, logits.log_softmax(-1), labels, strict=True)
                ]

            parts = list(batches(lengths, [1] * len(lengths), batch_size))
            found, nats = zip(*by_row(parts, read, progress), strict=True)
        rows = self.rows(split)
        expected = [[self.labels[target] for target in self._targets(row)] for row in rows]
        pairs = [pair for tags, said in zip(expected, found, strict=True) for pair in zip(tags, said, strict=True)]
        metrics = {
            **entity_scores(expected, found, prefixed=prefixed),
            "accuracy": sum(wanted == said for wanted, said in pairs) / len(pairs),
            "nll": torch.cat(nats).mean().item(),
        }
        predictions = [
            Prediction(" ".join(self._words(row)), " ".join(tags), " ".join(said), None)
            for row, tags, said in zip(rows, expected, found, strict=True)
        ]
        return Score(metrics, self.spec.metric, predictions)

    def _read_row(
        self, logprobs: torch.Tensor, wanted: torch.Tensor, firsts: list[int | None]
    ) -> tuple[list[str], torch.Tensor]:
        """The tags that a row's words are given, and minus the log-likelihoods of those that they have."""
        best, kept = logprobs.argmax(-1).tolist(), wanted != -100
        tags = [OUTSIDE if at is None else self.labels[best[at]] for at in firsts]
        return tags, -logprobs[kept].gather(-1, wanted[kept][:, None]).squeeze(-1)

    def _encode(self, tokenizer: Any, split: Split) -> list[tuple[dict[str, Any], list[int | None]]]:
        """Of each row that fits: its example, and the place of each word's first token, None where it has none."""
        if not tokenizer.is_fast:
            raise ScaloraError(
                f"task.kind is {self.kind()!r}, but {type(tokenizer).__name__} does not say where its tokens stand in "
                "a text: choose a model with a fast tokenizer (tokenizer.json)"
            )
        read = self.read_rows(split, lambda row: self._example(tokenizer, row))
        fits = self.fitting(split, [len(example["input_ids"]) for example, _ in read], self.spec.max_length)
        return [read[number] for number in fits]

    def _example(self, tokenizer: Any, row: PlacedRow) -> tuple[dict[str, Any], list[int | None]]:
        words, targets = self._words(row), self._targets(row)
        # As one text and not word by word: byte-level tokenizers then read the spaces that they were trained with.
        read = tokenizer(" ".join(words), return_offsets_mapping=True)
        firsts: list[int | None] = []
        spans, token, begin = read["offset_mapping"], 0, 0
        for word in words:
            end = begin + len(word)
            # A word's first token may be the space before it; the span of a token that was added is empty.
            while token < len(spans) and (spans[token][0] < begin - 1 or spans[token][0] == spans[token][1]):
                token += 1
            own = token < len(spans) and spans[token][0] < end
            firsts.append(token if own else None)
            token, begin = token + own, end + 1
        if not any(first is not None for first in firsts):
            raise ScaloraError(f"task.tokens: the words have no tokens in {row.place}; mend or drop the row")
        labels = [-100] * len(spans)
        for first, target in zip(firsts, targets, strict=True):
            if first is not None:
                labels[first] = target
        keys = [key for key in ("input_ids", "token_type_ids") if key in read]
        return {**{key: list(read[key]) for key in keys}, "labels": labels}, firsts

    def _words(self, row: PlacedRow) -> list[str]:
        return [str(word) for word in self._cells(row, self.spec.tokens, "task.tokens")]

    def _tags(self, row: PlacedRow) -> list[str]:
        return [label_text(tag) for tag in self._cells(row, self.spec.tags, "task.tags")]

    def _cells(self, row: PlacedRow, column: str, field: str) -> list[Any]:
        """What a column lists for a row; raises ScaloraError, with its place, where that is no list of texts."""
        value = row[column]
        if isinstance(value, str):
            if (listed := _listed(value)) is None:
                raise ScaloraError(
                    f"{field}: column {column!r} is {shown(value)} in {row.place}, a list that is not written in JSON: "
                    'write ["a", "b"], or words with white space between them'
                )
            value = listed
        if not isinstance(value, list) or not value:
            what = "empty" if value == [] else f"{shown(value)}, and no list"
            raise ScaloraError(f"{field}: column {column!r} is {what} in {row.place}; mend or drop the row")
        for place, each in enumerate(value, 1):
            if reason := flaw(each) or ("" if str(each).strip() else "is empty"):
                raise ScaloraError(
                    f"{field}: column {column!r}, number {place} of {len(value)}, {reason} in {row.place}; mend or "
                    "drop the row"
                )
        return value

    def _targets(self, row: PlacedRow) -> list[int]:
        """The places of a row's tags among the labels."""
        return [self.known.place(tag, row.place, by_number=True) for tag in self._tags(row)]


def _listed(text: str) -> list[Any] | None:
    """A cell of text as the list that it is in JSON, or else its words; None for a list that Python or numpy wrote."""
    inner = text.strip()
    if inner.startswith("["):
        try:
            if isinstance(found := json.loads(inner), list):
                return found
        except (ValueError, RecursionError):
            pass
        if inner.endswith("]") and (inner[1:2] in ("'", '"') or not re.search("[^][0-9 ,.\\n-]", inner)):
            return None
    return text.split()


def _is_code(name: str) -> bool:
    return number(name) is not None or name.lower() in ("true", "false")


TASKS = (TokenClassificationTask,)
