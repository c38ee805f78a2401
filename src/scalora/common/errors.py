"""The one exception users meet: it names the field, the value and the way out."""

from __future__ import annotations


class ScaloraError(ValueError):
    """Something the caller can mend: bad input, an unsupported combination, a missing file.

    The command line prints its message, without a traceback, and exits with code 2.
    """


class AgreedError(ScaloraError):
    """An error with which all processes of a run end, and which the first of them prints."""


def named(value: object) -> str:
    """A value for a message: itself where that is short, else what it is."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"
