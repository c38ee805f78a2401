"""Exact match: what a model writes by itself, compared with the reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from .task import Progress, evaluating


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
    """Greedy continuations of tokenised prompts, as texts, in their order."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike lengths together: little padding
    with evaluating(model, autocast) as device:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            length = max(len(prompts[i]) for i in batch)
            pad = tokenizer.pad_token_id
            ids = torch.tensor([[pad] * (length - len(prompts[i])) + list(prompts[i]) for i in batch], device=device)
            lengths = torch.tensor([len(prompts[i]) for i in batch], device=device)
            mask = (torch.arange(length, device=device) >= length - lengths[:, None]).long()
            found = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
            )
            for i, text in zip(batch, tokenizer.batch_decode(found[:, length:], skip_special_tokens=True), strict=True):
                texts[i] = text
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
    return texts


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match's first group (or the whole match), without thousands separators, spaces and a final point."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    found = matches[-1].group(1) if pattern.groups else matches[-1].group()
    return re.sub(r"(?<=\d),(?=\d{3})", "", found).strip().rstrip(".").strip()
