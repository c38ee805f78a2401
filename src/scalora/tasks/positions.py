"""Whether a model has a position for every token that a task makes it read or write, and an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..common.errors import ScaloraError
from ..models.processors import vocabulary
from .task import Split, TokenDataset

_TABLES = ("wpe", "position_embeddings", "embed_positions", "position_embedding", "pos_embed")


def positions(model: nn.Module) -> int | None:
    """How many tokens the model's table of positions has room for; None where it has none, as with RoPE or ALiBi.

    RoBERTa and its like count from behind the padding token's id, OPT from 2: such rows are no room.
    """
    config: Any = model.config
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            offset = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - int(offset))
    for name, table in model.named_buffers():  # GPT-J and CodeGen look their rotations up
        if name.rpartition(".")[2] == "embed_positions" and len(table) == stated:
            found.append(len(table))
    return min(found, default=None)


def check_positions(
    model: nn.Module, datasets: Mapping[Split, TokenDataset], max_length: int | None, max_new_tokens: int | None
) -> None:
    """Look at the longest texts before anything is trained: beyond its table a model fails in the middle of a run.

    Args:
        model: what reads them.
        datasets: the task's, of every split.
        max_length: the task's; None where it has none.
        max_new_tokens: what the model may write after a prompt, if the task makes it write.

    Raises:
        ScaloraError: a text, or what would be written, is too long; the message names the field and the limit.
    """
    room = positions(model) if max_length is not None else None
    if room is None:
        return
    has = f"{type(model).__name__} has {room} positions"
    for split, dataset in datasets.items():
        if dataset.longest > room:
            raise ScaloraError(
                f"task.max_length is {max_length}, but {has}, and a text of the {split} rows has {dataset.longest} "
                f"tokens: set task.max_length to {room} or less, or choose another model"
            )
        # The last token that is written is not read again.
        if max_new_tokens and dataset.longest_prompt + max_new_tokens - 1 > room:
            way_out = f"set task.max_new_tokens to {room + 1 - dataset.longest_prompt} or less, or lower max_length"
            raise ScaloraError(
                f"task.max_new_tokens is {max_new_tokens}, but {has}, and a prompt of the {split} rows has "
                f"{dataset.longest_prompt} tokens: {way_out}"
            )


def check_vocabulary(model: nn.Module, tokenizer: Any, datasets: Mapping[Split, TokenDataset]) -> None:
    """Look for tokens without an embedding, as those are that were added to a tokenizer alone.

    Raises:
        ScaloraError: there is one; the message names it.
    """
    if (rows := vocabulary(model)) is None:
        return
    for split, dataset in datasets.items():
        read = (example.get(key, ()) for example in dataset.examples for key in ("input_ids", "rejected_ids"))
        largest = max((max(ids, default=0) for ids in read), default=0)
        if largest >= rows:
            raise ScaloraError(
                f"model: {type(model).__name__} has embeddings for {rows} tokens, but the {split} rows have the token "
                f"{tokenizer.convert_ids_to_tokens(largest)!r}, number {largest} from 0: save the model with more "
                "(resize_token_embeddings), or choose another"
            )
