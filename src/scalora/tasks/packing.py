"""Several documents in one block that do not see one another: positions begin anew at each."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from ..common.errors import ScaloraError
from .examples import Collator, TokenDataset
from .padding import distance
from .scoring import Progress, batches, by_row, evaluating

_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)
_SAME = 1e-4  # what another document holds must not count at all, in any dtype


def packed(documents: Sequence[Sequence[int]], start: int, size: int) -> TokenDataset:
    """Blocks of at most ``size`` tokens: `input_ids`, `position_ids`, and `labels` but for the first token of a piece.

    Each document begins with ``start``, which is not learnt. Where a block ends it is cut, and what comes after is read
    from its last token on, as a piece of its own.
    """
    blocks: list[list[list[int]]] = [[]]
    room = size
    for document in documents:
        whole, begin = [start, *document], 0
        while begin < len(whole) - 1:
            if room < 2:
                blocks.append([])
                room = size
            piece = whole[begin : begin + room]
            blocks[-1].append(piece)
            room -= len(piece)
            begin += len(piece) - 1
    return TokenDataset([_example(block) for block in blocks], 0)


def _example(block: Sequence[list[int]]) -> dict[str, Any]:
    return {
        "input_ids": [token for piece in block for token in piece],
        "position_ids": [place for piece in block for place in range(len(piece))],
        "labels": [label for piece in block for label in (-100, *piece[1:])],
    }


@dataclass(frozen=True)
class PackedCollator:
    """Batches without a mask: transformers makes one of the positions, or its kernels do, where nothing is cached."""

    single: Collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        plain = [{"input_ids": each["input_ids"], "labels": each["labels"]} for each in examples]
        batch = self.single(plain)
        del batch["attention_mask"]  # padding comes last, where nothing learnt sees it
        places = [torch.tensor(each["position_ids"]) for each in examples]
        batch["position_ids"] = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)
        return {**batch, "use_cache": False}


def packed_logprobs(
    model: Any,
    collate: PackedCollator,
    dataset: TokenDataset,
    *,
    batch_size: int,
    autocast: torch.dtype | None,
    progress: Progress | None,
) -> torch.Tensor:
    """The log-probability of every token that has a label, in order: float64, on the CPU."""
    lengths = [len(example["input_ids"]) for example in dataset.examples]
    with evaluating(model, autocast) as device:

        def read(batch: list[int]) -> list[torch.Tensor]:
            inputs = _on(collate([dataset[i] for i in batch]), device)
            wanted = inputs.pop("labels")[:, 1:]
            logprobs = model(**inputs).logits[:, :-1].float().log_softmax(-1)
            found = logprobs.gather(-1, wanted.clamp(min=0)[..., None]).squeeze(-1)
            return [own[kept].double().cpu() for own, kept in zip(found, wanted != -100, strict=True)]

        return torch.cat(by_row(list(batches(lengths, lengths, batch_size)), read, progress))


def check_apart(model: Any, field: str, otherwise: str) -> None:
    """See that a model reads a document as it would alone, whatever stands before it in its block.

    Not so where it has no use for positions (recurrent states, ALiBi). Twelve tokens tell.

    Raises:
        ScaloraError: it does not; the message names the recipe's ``field``, and the value to set ``otherwise``.
    """
    tokens = range(min(12, model.get_input_embeddings().num_embeddings))
    first, second, document = tokens[:4], tokens[4:8], tokens[8:]
    collate = PackedCollator(Collator(0))
    reason = "takes no position_ids"
    whose = model.get_base_model() if isinstance(model, PeftModel) else model  # whose own forward names nothing
    if "position_ids" in inspect.signature(whose.forward).parameters:
        try:
            with evaluating(model, None) as device:
                after, other, alone = (
                    _read(model, collate, [*pieces, document], device) for pieces in ([first], [second], [])
                )
            rounding = 2e-3 if alone.dtype == torch.float32 else 5e-2
            if distance(after, other) < _SAME and distance(after, alone) < rounding:
                return
            reason = "lets documents see those before them"
        except _FAILURES as error:
            reason = f"cannot read documents side by side ({' '.join(str(error).split())[:120]})"
    raise ScaloraError(f"{field} is 'apart', but {type(whose).__name__} {reason}: set {field}: {otherwise}")


def _read(model: Any, collate: PackedCollator, pieces: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Logits at the last piece."""
    inputs = _on(collate([_example([list(piece) for piece in pieces])]), device)
    del inputs["labels"]
    return model(**inputs).logits[0, -len(pieces[-1]) :]


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
