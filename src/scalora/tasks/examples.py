"""Training examples, and batches of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset


class TokenDataset(Dataset):
    """Tokenised examples without padding: dicts of `input_ids`, `labels` (and `token_type_ids` where a model has them).

    `truncated` counts the examples that were cut to max_length. `longest` is the most tokens that the model reads at a
    time in learning or scoring these rows, and `longest_prompt` the most that it goes on writing after.
    """

    def __init__(self, examples: list[dict[str, Any]], truncated: int) -> None:
        self.examples = examples
        self.truncated = truncated
        self.longest = max((len(example.get("input_ids", ())) for example in examples), default=0)
        self.longest_prompt = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]

    def token_bytes(self) -> Iterator[bytes]:
        """The tokens of each example, after their number."""
        for ids in (example["input_ids"] for example in self.examples):
            yield array("q", [len(ids), *ids]).tobytes()

    def content(self) -> str:
        """A digest of what the rows only name, as the end of one of the rows; empty where they say all."""
        return ""


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right into a batch of `[batch, length]` tensors, with an `attention_mask`.

    Labels that are lists are padded with -100, which the loss ignores; numbers become a `[batch]` tensor.
    """

    pad_token_id: int
    lean: bool = False
    """Ask a causal model for logits only at the positions before labels: with one label per prompt that saves most."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.pad_token_id, "token_type_ids": 0, "labels": -100}
        length = max(len(example["input_ids"]) for example in examples)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        batch = {"attention_mask": (torch.arange(length) < lengths[:, None]).long()}
        for key in examples[0]:
            values = [example[key] for example in examples]
            if isinstance(values[0], list):
                values = [value + [fill[key]] * (length - len(value)) for value in values]
            batch[key] = torch.tensor(values)
        if self.lean:
            following = batch["labels"][:, 1:]
            batch["logits_to_keep"] = (following != -100).any(0).nonzero()[:, 0]
            batch["shift_labels"] = following[:, batch["logits_to_keep"]]
        return batch
