"""What a cell holds: text, a label or a number; and what is none of them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

# What pandas.read_csv takes for a missing value.
_MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", 
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_PLAIN_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII)


def flaw(value: Any) -> str | None:
    """Why a value is no text and no number, as the end of a sentence that begins with its place; None if it is one."""
    if value is None:
        return "is null"
    if isinstance(value, str):
        if "\0" in value:
            return "holds a NUL character, which text has not"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"holds half of a surrogate pair ({value[error.start]!r}), which is no character"
        return None
    if not isinstance(value, bool | int | float | Decimal):
        return f"is {shown(value)}, a {type(value).__name__} and no text"
    if isinstance(value, int) or math.isfinite(value):
        return None
    return "is NaN" if math.isnan(value) else f"is {value}"


def shown(value: Any, width: int = 80) -> str:
    """A value as messages show it, in at most so many characters."""
    try:
        return repr(value)[:width]
    except (RecursionError, ValueError):  # too deep, too many digits
        return f"a {type(value).__name__}"


def is_missing(value: Any) -> bool:
    """Whether a text is empty or what programs write where there is no value (NaN, None, NA, …)."""
    return isinstance(value, str) and value.strip() in _MISSING


def number(value: Any) -> float | None:
    """A finite number, of a number or of its decimal form; None for all else."""
    if (isinstance(value, str) and not _NUMBER.fullmatch(value.strip())) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def label_text(value: Any) -> str:
    """The text of a label. White space around it is no part of it, and equal numbers have the same: "1" for 1 and 1.0.

    A text that begins with zeros, as 012, is no number but a name.
    """
    return _label_text(str(value))


@lru_cache(maxsize=4096)
def _label_text(text: str) -> str:
    text = text.strip()
    if not _PLAIN_NUMBER.fullmatch(text):
        return text
    try:
        # As many digits as the text has are enough: nothing is rounded.
        decimal = Decimal(text).normalize(Context(prec=len(text), Emax=MAX_EMAX, Emin=MIN_EMIN))
    except InvalidOperation:
        return text
    if not decimal:
        return "0"
    return f"{decimal:f}" if abs(decimal.adjusted()) < 5000 else str(decimal)


def label_key(value: Any) -> str:
    """What labels that are the same have in common: their text, and for true and false (True, TRUE) not its case."""
    text = label_text(value)
    return text.lower() if text.lower() in ("true", "false") else text


def lookalike(value: Any, known: Iterable[Any]) -> str:
    """What to say where a label is none of those that are known, but looks like one; nothing where it does not."""
    text = label_text(value)
    others = [each for each in map(label_text, known) if each != text]
    if near := next((each for each in others if each.casefold() == text.casefold()), None):
        return f"; it differs only in case from {near!r}"
    if near := next((each for each in others if _look(each) == _look(text)), None):
        return f"; it differs from {near!r} only in white space, invisible characters or how accents are encoded"
    return ""


def _look(text: str) -> str:
    visible = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFC", visible).casefold().split())
