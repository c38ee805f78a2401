"""Entities: what tags say of a row of words, and how well those that are found agree with those that are there.

An entity counts as found only with its type, its first and its last word; that is CoNLL's measure, and seqeval's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..common.errors import ScaloraError

OUTSIDE = "O"
"""The tag of words that belong to no entity."""
_PREFIXED = re.compile(r"([BIESLU])-(.+)")
_GO_ON, _GONE_ON = "IEL", "BI"
"""The prefixes of words that may go on an entity, and of words after which it may go on."""


class Entity(NamedTuple):
    """Its type, its first word, and the word after its last."""

    type: str
    start: int
    end: int


def has_prefixes(tags: Iterable[str]) -> bool:
    """Whether tags are of the IOB family (B-PER, I-PER; IOBES and BILOU too), and not plain types.

    Raises:
        ScaloraError: some are, and others are not; or there is an "o", which would be an entity.
    """
    types = sorted(set(tags) - {OUTSIDE})
    if OUTSIDE.lower() in types:
        raise ScaloraError(
            f"task.tags: {OUTSIDE.lower()!r} would be a type of entities: write {OUTSIDE!r}, and B- and I- before types"
        )
    plain = [tag for tag in types if not _PREFIXED.fullmatch(tag)]
    if plain and len(plain) < len(types):
        other = next(tag for tag in types if tag not in plain)
        raise ScaloraError(
            f"task.tags: {plain[0]!r} has no prefix as {other!r} has: write all tags but {OUTSIDE} with B- and I-, or "
            "all without"
        )
    return bool(types) and not plain


def entities(tags: Sequence[str], *, prefixed: bool) -> list[Entity]:
    """The entities of one row, by its words' tags.

    With prefixes they are read as CoNLL's evaluation reads them: an entity goes on where I (or E) follows B or I of
    its type, and an I that goes on nothing begins one. Without, equal tags beside each other are one entity.
    """
    found: list[Entity] = []
    before, kind = OUTSIDE, ""
    for place, tag in enumerate(tags):
        prefix, type_ = _parts(tag, prefixed)
        if tag != OUTSIDE:
            goes_on = type_ == kind and (not prefixed or (prefix in _GO_ON and before in _GONE_ON))
            start = found.pop().start if goes_on else place
            found.append(Entity(type_, start, place + 1))
        before, kind = prefix, type_
    return found


def _parts(tag: str, prefixed: bool) -> tuple[str, str]:
    match = _PREFIXED.fullmatch(tag) if prefixed else None
    return (match[1], match[2]) if match else ("", "" if tag == OUTSIDE else tag)


def entity_scores(
    expected: Sequence[Sequence[str]], found: Sequence[Sequence[str]], *, prefixed: bool
) -> dict[str, float]:
    """`f1`, `precision` and `recall` over all entities of all rows; each is 0 where there is nothing to divide by."""
    there = {(row, each) for row, tags in enumerate(expected) for each in entities(tags, prefixed=prefixed)}
    said = {(row, each) for row, tags in enumerate(found) for each in entities(tags, prefixed=prefixed)}
    right = len(there & said)
    return {
        "f1": 2 * right / max(1, len(there) + len(said)),
        "precision": right / max(1, len(said)),
        "recall": right / max(1, len(there)),
    }
