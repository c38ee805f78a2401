"""From texts to token ids: a prompt and what follows it, read together and cut where they meet."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ..common.errors import ScaloraError
from .data.rows import PlacedRow

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt (never empty) and of what follows it (never empty)."""

_MARGIN = 4  # tokens decoded before a text, where a decoder may drop a space or begin inside a character


def encode(tokenizer: Any, texts: Sequence[tuple[str, str]], rows: Sequence[PlacedRow] | None = None) -> list[Pair]:
    """Token ids of (prompt, following text) pairs. The two ids together are those of the two texts as one.

    A pair is cut after the tokens that the prompt has when it is read alone. So a token that spans the joint belongs to
    the following text: the model reads what the row says, and all of that text is learned and scored. The choices of
    one row are cut at one place, the earliest, for their likelihoods to be comparable. Spaces at the prompt's end go to
    the following text, since most tokenizers join a space to the word after it. lm-evaluation-harness cuts there too,
    but for tokens that span. What a tokenizer adds in front stays in front; what it adds behind is left out.

    Args:
        tokenizer: transformers' tokenizer, slow or fast.
        texts: the pairs.
        rows: the row that each pair belongs to, which messages name; None is a row for each.

    Raises:
        ScaloraError: a following text adds no token, or some of its characters are lost in tokens.
    """
    if not texts:
        return []
    rows = [PlacedRow({}, "") for _ in texts] if rows is None else rows
    wholes = token_ids(tokenizer, [prompt + following for prompt, following in texts])
    distinct = list(dict.fromkeys(end for prompt, _ in texts for end in (prompt.rstrip(), prompt)))
    alone = dict(zip(distinct, token_ids(tokenizer, distinct), strict=True))
    prompts: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (row, (prompt, _)) in enumerate(zip(rows, texts, strict=True)):
        prompts[id(row)][prompt].append(index)
    joints: dict[int, int] = {}
    for members in prompts.values():
        for prompt, indices in members.items():
            joint, clean = _joint(prompt, alone, [wholes[i] for i in indices])
            if len(members) > 1 and not clean:
                text = texts[indices[0]][1]
                raise ScaloraError(
                    f"task: the text {text!r} runs into the last word of {prompt[-60:]!r}{_place(rows[indices[0]])}, "
                    "which differs from choice to choice: begin it with a space"
                )
            joints |= dict.fromkeys(indices, joint)
    added = _added_before(tokenizer, texts[0][0] + texts[0][1], wholes[0])
    pairs = []
    for index, whole in enumerate(wholes):
        prompt, following = whole[: joints[index]], whole[joints[index] :]
        _check_kept(tokenizer, whole, len(following), texts[index], rows[index])
        # The first token needs something before it to be predicted from.
        pairs.append(([*_in_front(added, whole), *prompt] or [_start(tokenizer)], following))
    return pairs


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts to be written on: with what the tokenizer adds in front, and nothing behind.

    Spaces at the end are left to what is written, as :func:`encode` leaves them to the following text.
    """
    read = [prompt.rstrip(" ") for prompt in prompts]
    plain = token_ids(tokenizer, read)
    longest = max(range(len(read)), key=lambda i: len(plain[i]), default=0)
    added = _added_before(tokenizer, read[longest], plain[longest]) if read else []
    return [[*_in_front(added, ids), *ids] or [_start(tokenizer)] for ids in plain]


def truncate_prompts(
    pairs: Sequence[Pair], max_length: int, rows: Sequence[PlacedRow] | None = None
) -> tuple[list[Pair], int]:
    """Prompts cut on the left, so that pairs are at most `max_length` tokens long; and how many were cut.

    Raises:
        ScaloraError: a following text leaves no room for even one token of its prompt.
    """
    fitting, truncated = [], 0
    for index, (prompt, following) in enumerate(pairs):
        room = max_length - len(following)
        if room < 1:
            where = _place(rows[index]) if rows else ""
            raise ScaloraError(
                f"task.max_length is {max_length}, but an answer{where} has {len(following)} tokens; "
                f"set it to {len(following) + 1} or more"
            )
        truncated += len(prompt) > room
        fitting.append((prompt[-room:], following))
    return fitting, truncated


def _place(row: PlacedRow) -> str:
    return f" in {row.place}" if row.place else ""


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of the texts themselves."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


def _joint(prompt: str, alone: dict[str, list[int]], wholes: Sequence[list[int]]) -> tuple[int, bool]:
    """The number of tokens that all of a prompt's wholes share with it, and whether that is the prompt to its end.

    Where the prompt without its last spaces and line ends is no clean cut, with them it may be: ":\\n" can be a token.
    """
    joints = []
    for end in (prompt.rstrip(), prompt):
        ids = alone[end]
        alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(ids, *wholes, strict=False))
        joints.append(sum(1 for _ in alike))
        if joints[-1] == len(ids):
            return joints[-1], True
    return joints[0], False


def _added_before(tokenizer: Any, text: str, plain: Sequence[int]) -> list[int]:
    """What the tokenizer puts in front of a text by itself, mostly nothing or a bos token."""
    full = list(tokenizer([text])["input_ids"][0])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == list(plain):
            return full[:start]
    raise ScaloraError(
        f"task: the tokenizer reads {text[:60]!r} otherwise where it adds tokens of its own; choose another tokenizer"
    )


def _in_front(added: list[int], ids: Sequence[int]) -> list[int]:
    """`added`, unless a text brings it along, as chat templates do."""
    return [] if list(ids[: len(added)]) == added else added


def _start(tokenizer: Any) -> int:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ScaloraError(
            "task.prompt is empty and the tokenizer has no bos or eos token to start from; give a prompt"
        )
    return start


def _check_kept(tokenizer: Any, whole: list[int], following: int, texts: tuple[str, str], row: PlacedRow) -> None:
    prompt, text = texts
    where = f"task: the text {text[:60]!r} after the prompt {prompt[-60:]!r}{_place(row)}"
    if not following:
        reason = "the tokenizer drops all of it" if text.strip() else "it may not be empty"
        raise ScaloraError(f"{where} adds no token; {reason}")
    read = tokenizer.decode(whole[-following - _MARGIN :], clean_up_tokenization_spaces=False)
    # Some decoders drop the space that a whole text begins with.
    if not _ends_with(read, text.lstrip(" ") if len(whole) == following else text):
        raise ScaloraError(
            f"{where} is not kept by the tokenizer, which makes ...{read[-len(text) - 20 :]!r} of it; begin it with a "
            "space, write it as the tokenizer does, or choose another model"
        )


def _ends_with(read: str, text: str) -> bool:
    """Whether what was read ends with the text, in any Unicode form of it.

    Tokens that are whole words imply single spaces between them, and write them where they will. Other white space
    says something, and must be there.
    """
    read, text = unicodedata.normalize("NFKC", read), unicodedata.normalize("NFKC", text)
    implied = re.fullmatch(r" ?\S+( \S+)*", text) is not None
    return read.endswith(text) or (implied and "".join(read.split()).endswith("".join(text.split())))
