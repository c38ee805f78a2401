"""Exact match: what a model writes by itself, compared with the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..common import processes
from ..common.errors import ScaloraError
from ..layers.sharding import is_sharded
from .padding import pad_left, reads_alike
from .scoring import Progress, by_row, evaluating


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    autocast: torch.dtype | None,
    progress: Progress | None,
) -> list[str]:
    """Greedy continuations of tokenised prompts, as texts, in their order.

    A model that reads a prompt otherwise beside longer ones gets one prompt at a time.

    Raises:
        ScaloraError: the model cannot generate.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike lengths together: little padding
    pad, greedy = tokenizer.pad_token_id, greedily(model, tokenizer)
    with evaluating(model, autocast) as device:

        def write(rows: Sequence[Sequence[int]], pad: int, new_tokens: int, **options: Any) -> Any:
            ids, mask = pad_left(rows, pad, device)
            # Penalties of a model's own generation config would count the padding, and so depend on the batch.
            with refusing_generation("task.answer", "leave it out"):
                return model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, **greedy, **options
                )

        def first_logits(rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
            return write(rows, pad, 1, return_dict_in_generate=True, output_logits=True).logits[0]

        if prompts and batch_size > 1 and not reads_alike(first_logits, prompts, pad, autocast or model.dtype):
            batch_size = 1

        def written(batch: list[int]) -> list[str]:
            rows = [prompts[i] for i in batch]
            found = write(rows, pad, max_new_tokens)[:, max(map(len, rows)) :]
            return tokenizer.batch_decode(found, skip_special_tokens=True)

        parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        return by_row(parts, written, progress)


def greedily(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What `generate` is told for greedy text, whatever the model's own generation config says."""
    return {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": endings(model, tokenizer),
        "synced_gpus": processes.count() > 1 and is_sharded(next(model.parameters())),
    }


@contextmanager
def refusing_generation(field: str, way_out: str) -> Iterator[None]:
    """Raises ScaloraError, naming the field that asks for it, where a model turns out to be unable to generate."""
    try:
        yield
    except ScaloraError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        raise ScaloraError(
            f"{field}: this model cannot write by itself ({' '.join(str(error).split())[:200]}); {way_out}, or choose "
            "another model"
        ) from error


def endings(model: Any, tokenizer: Any) -> list[int]:
    """The tokens after which nothing is written: the one that completions are trained to end with, and the model's."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match's first group (or the whole match), without thousands separators, spaces and a final point."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    found = matches[-1].group(1) if pattern.groups else matches[-1].group()
    return re.sub(r"(?<=\d),(?=\d{3})", "", found).strip().rstrip(".").strip()
