"""Plain documents, learnt as they are: continued pre-training on a domain.

The documents of a split are joined into one stream, with the end-of-text token before the first and after each. It is
cut to blocks of `max_length` tokens, each of which begins with the last token of the one before. So every token is
learnt and scored exactly once, from what its block holds before it: at a block's start that is one token. Splits are
made of documents, never of blocks: no document is in two.

With `documents: apart` a block holds the same, but a document sees nothing of those before it, and begins with an
end-of-text token of its own.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import Field

from ..common.errors import ScaloraError
from .completion import examples, token_logprobs
from .data.rows import PlacedRow
from .encoding import Pair, token_ids
from .packing import PackedCollator, check_apart, packed, packed_logprobs
from .task import BaseTaskSpec, Collator, Prediction, Score, Split, Task, TokenDataset
from .template import Template


class TextSpec(BaseTaskSpec, frozen=True):
    """Read the documents in the column `text`."""

    kind: Literal["text"] = "text"
    text: str = "text"
    documents: Literal["joined", "apart"] = "joined"
    """Whether a document sees those before it in its block."""
    max_length: int = Field(default=512, ge=2)


class TextTask(Task):
    """Loss and score are on all tokens, those that end the documents included."""

    Spec = TextSpec
    head = "causal-lm"
    spec: TextSpec

    def __init__(self, spec: TextSpec) -> None:
        super().__init__(spec)
        self.text = Template("task.text", spec.text, is_column=True)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.text.columns

    def check(self, row: PlacedRow) -> None:
        self.text.check(row, keep_missing=self.data.missing == "keep")

    def collator(self, tokenizer: Any, model: Any = None) -> Any:
        return super().collator(tokenizer, model) if self._joined else PackedCollator(Collator(tokenizer.pad_token_id))

    def equip(self, model: Any) -> None:
        if not self._joined:
            check_apart(model, "task.documents", "joined")

    @property
    def _joined(self) -> bool:
        return self.spec.documents == "joined"

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        return self._dataset(self._documents(tokenizer, split))

    def _dataset(self, documents: list[list[int]]) -> TokenDataset:
        if self._joined:
            return examples(self._blocks(documents), 0)
        return packed(documents, documents[0][-1], self.spec.max_length)

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """`nll`, nats per token, and `nats_per_byte`, the same nats per byte of the documents in UTF-8.

        The tokens that end the documents count in both. Only the second can be compared between tokenizers. A
        prediction is of a document, with the mean probability (geometric) of its tokens.
        """
        documents, texts = self._documents(tokenizer, split), [self.text(row) for row in self.rows(split)]
        how: Any = {"batch_size": batch_size, "autocast": autocast, "progress": progress}
        if self._joined:
            logprobs = torch.cat(token_logprobs(model, tokenizer, self._blocks(documents), **how)).double()
        else:
            logprobs = packed_logprobs(model, self.collator(tokenizer), self._dataset(documents), **how)
        each = logprobs.split([len(ids) for ids in documents])
        predictions = [
            Prediction(text, "", None, math.exp(own.mean().item())) for text, own in zip(texts, each, strict=True)
        ]
        size = sum(len(text.encode()) for text in texts)
        metrics = {"nll": -logprobs.mean().item(), "nats_per_byte": -logprobs.sum().item() / size}
        return Score(metrics, "nll", predictions)

    def _documents(self, tokenizer: Any, split: Split) -> list[list[int]]:
        """The tokens of every document, with the one that ends it."""
        if tokenizer.eos_token_id is None:
            raise ScaloraError("task.kind is 'text', but the tokenizer has no eos token to end a document with")
        ids = token_ids(tokenizer, [self.text(row) for row in self.rows(split)])
        return [[*document, tokenizer.eos_token_id] for document in ids]

    def _blocks(self, documents: list[list[int]]) -> list[Pair]:
        """One token, and at most `max_length` - 1 that are predicted after it."""
        end = documents[0][-1]
        stream, size = [end, *chain.from_iterable(documents)], self.spec.max_length - 1
        return [(stream[i : i + 1], stream[i + 1 : i + 1 + size]) for i in range(0, len(stream) - 1, size)]


TASKS = (TextTask,)
