"""How many rows of each source are malformed, whenever that is found."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from ...common.errors import ScaloraError
from .source import BadRow


class Tally:
    """Malformed rows by their source: the reader finds some, the tokenizer others, in each split made of it."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._bad: dict[str, list[BadRow]] = {}

    def count(self, source: str, rows: int) -> None:
        """Say how many rows a source holds, the malformed ones included; a source is the field that names it."""
        self._rows[source] = rows

    def leave_out(self, split: str, source: str, bad: Sequence[BadRow], rows: int, allowed: int) -> str:
        """What to say of more rows that are left out since they are malformed.

        Args:
            split: where they were found.
            source: the field of `task.data` that this split's rows were read from.
            bad: where they are and what is wrong with each.
            rows: how many the split has, with the others.
            allowed: how many of the source may be left out.

        Raises:
            ScaloraError: those of the source are more by now, or these are all of the split.
        """
        if len(bad) == rows:
            raise _too_many(split, bad, rows, allowed)
        found = self._bad[source] = [*self._bad.get(source, []), *bad]
        if len(found) > allowed:
            raise _too_many(source, found, self._rows.get(source, rows), allowed)
        return f"{_counted(split, bad, rows)} and are left out (max_bad_rows); the first: {_first(bad)}"


def _too_many(what: str, bad: Sequence[BadRow], rows: int, allowed: int) -> ScaloraError:
    return ScaloraError(f"{_counted(what, bad, rows)}, and max_bad_rows is {allowed}; the first: {_first(bad)}")


def _counted(what: str, bad: Sequence[BadRow], rows: int) -> str:
    return f"task.data.{what}: {len(bad)} of {rows} rows are malformed"


def _first(bad: Sequence[BadRow]) -> ScaloraError:
    # By its line: unparsable lines are found before all others, and the rows of a split are shuffled.
    return min(bad, key=attrgetter("line")).error
