"""Whether a model is a causal language model to us: what it computes, found out from a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch

from ..common.errors import ScaloraError
from .padding import distance
from .scoring import evaluating
from .task import Collator, TokenDataset

_TOKENS = 8
_ROWS = 50  # of the data, to take different tokens from
_SHARE = 0.05  # of the differences between losses that rounding may make
_SEEN = 2e-5  # of the spread of predictions that a token after them may make; it makes none, but for grouped experts

_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)


def check_causal(
    model: Any, collator: Collator, dataset: TokenDataset, autocast: torch.dtype | None = None
) -> Collator:
    """The collator with which a model learns to predict the next token; it is lean only if the model understands that.

    Not all classes that transformers calls causal language models do: in some (TrOCR's and Whisper's decoders, XLNet)
    the labels are not shifted, and the model would learn to copy each token; some put a prompt of their own before the
    text, or see the tokens that they are to predict. Six passes over some eight tokens tell. Neither the random state
    nor the model's mode is changed.

    Args:
        model: on its device, not adapted yet.
        collator: what makes batches of the training examples.
        dataset: the training examples.
        autocast: dtype to compute in, if not the model's.

    Raises:
        ScaloraError: the model is none; the message names its class.
    """
    rows = (dataset[i]["input_ids"] for i in range(min(len(dataset), _ROWS)))
    ids = list(islice(dict.fromkeys(chain.from_iterable(rows)), _TOKENS))
    if len(ids) < 2:
        return collator  # nothing to tell one token's place from another's by
    devices = [next(model.parameters()).device]
    with torch.random.fork_rng([d for d in devices if d.type != "cpu"]), evaluating(model, autocast) as device:
        return _right_collator(model, collator, ids, device)


def _right_collator(model: Any, collator: Collator, ids: list[int], device: torch.device) -> Collator:
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def run(batch: dict[str, torch.Tensor]) -> Any:
        return model(**{name: value.to(device) for name, value in batch.items()}, **options)

    def logits(row: Sequence[int]) -> torch.Tensor:
        batch = replace(collator, lean=False)([{"input_ids": list(row)}])
        try:
            found = run(batch).logits
        except _FAILURES as error:
            raise ScaloraError(
                f"model: {type(model).__name__} cannot read {len(ids)} tokens ({_words(error)}); check its config"
            ) from error
        if found.shape[:2] != batch["input_ids"].shape:
            raise _refused(model, f"gives {found.shape[1]} predictions for {len(ids)} tokens")
        return found[0, :-1]

    before = logits(ids)
    if distance(before, logits([*ids[:-1], ids[0]])) > (_SEEN if before.dtype == torch.float32 else 100 * _SEEN):
        raise _refused(model, "sees the tokens that it is to predict")
    wanted = -before[-1][ids].float()  # the loss of each as the last token, but for what they share
    reason = ""
    for lean in dict.fromkeys((collator.lean, False)):
        tried = replace(collator, lean=lean)
        try:
            losses = [
                run(tried([{"input_ids": ids, "labels": [*[-100] * (len(ids) - 1), label]}])).loss.float()
                for label in ids[: _TOKENS // 2]
            ]
        except _FAILURES as error:
            reason = f"cannot compute a loss on {len(ids)} tokens ({_words(error)})"
            continue
        found, right = torch.stack(losses), wanted[: len(losses)]
        found, right = found - found.mean(), right - right.mean()
        if (found - right).abs().max() <= _SHARE * right.abs().max():
            return tried
        reason = "does not shift its labels: it would learn to copy each token, not to predict the next"
    raise _refused(model, reason)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _refused(model: Any, what: str) -> ScaloraError:
    name = type(model).__name__
    return ScaloraError(f"model: {name} {what}; choose a decoder-only language model, as Llama, Qwen or GPT-2")
