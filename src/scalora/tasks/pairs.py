"""Two answers to one prompt: examples, batches, and DPO's loss on them (2305.18290)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .examples import Collator, TokenDataset
from .turns import Turns


class PairDataset(TokenDataset):
    """Two answers each: `input_ids` and `labels` of the chosen one, `rejected_ids` and `rejected_labels`, and where the
    base model was measured its two log-probabilities as `reference`."""

    def __init__(self, pairs: Sequence[tuple[Turns, Turns]], references: Sequence[float] | None) -> None:
        examples: list[dict[str, Any]] = []
        for number, (chosen, rejected) in enumerate(pairs):
            example: dict[str, Any] = dict(pair_side(chosen))
            example["rejected_ids"], example["rejected_labels"] = pair_side(rejected).values()
            if references is not None:
                example["reference"] = list(references[2 * number : 2 * number + 2])
            examples.append(example)
        super().__init__(examples, 0)
        self.longest = max(self.longest, *(len(example["rejected_ids"]) for example in examples))

    def token_bytes(self) -> Iterator[bytes]:
        yield from super().token_bytes()
        yield from TokenDataset([{"input_ids": each["rejected_ids"]} for each in self.examples], 0).token_bytes()


@dataclass(frozen=True)
class PairCollator:
    """Batches of `[2·pairs, length]`, first all chosen answers and then all rejected, with `reference` `[pairs, 2]`."""

    single: Collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        chosen = [{"input_ids": each["input_ids"], "labels": each["labels"]} for each in examples]
        rejected = [{"input_ids": each["rejected_ids"], "labels": each["rejected_labels"]} for each in examples]
        batch = self.single([*chosen, *rejected])
        return {**batch, "reference": torch.tensor([each["reference"] for each in examples])}


def learn_from_pairs(model: nn.Module, beta: float) -> None:
    """Let a causal language model have DPO's loss for batches with a `reference`, in place; others it reads as before.

    So whatever asks a model for its loss (Trainer, methods that start from gradients) learns from pairs.
    """
    forward = model.forward

    @functools.wraps(forward)
    def paired(*args: Any, reference: Tensor | None = None, **kwargs: Any) -> Any:
        if reference is None:
            return forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs.pop("num_items_in_batch", None)
        output = forward(*args, **kwargs)
        chosen, rejected = answer_logprobs(output.logits, labels).chunk(2)
        output.loss = dpo_loss(chosen, rejected, reference, beta)
        return output

    model.forward = paired  # pyright: ignore[reportAttributeAccessIssue]
    model.accepts_loss_kwargs = False  # pyright: ignore  # the loss is a mean over pairs, which Trainer is to scale


def dpo_loss(chosen: Tensor, rejected: Tensor, reference: Tensor, beta: float) -> Tensor:
    """DPO's sigmoid loss, a mean over pairs.

    Args:
        chosen: log-probabilities `[pairs]` under the model, in nats.
        rejected: the same of the other answers.
        reference: the base model's, `[pairs, 2]`.
        beta: how much a nat counts.
    """
    margins = (chosen - reference[:, 0]) - (rejected - reference[:, 1])
    return -functional.logsigmoid(beta * margins).mean()


def answer_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed log-probability `[rows]`, float32, of the tokens that have labels `[rows, length]`."""
    each = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return -each.view(len(labels), -1).sum(-1)


def pair_side(turns: Turns) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one answer after its prompt."""
    labels = [token if own else -100 for token, own in zip(*turns, strict=True)]
    return {"input_ids": turns.ids, "labels": labels}
