"""Who competes, and how that is written: a method at a rank, with options that have one value each or several."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from ..common.errors import ScaloraError
from ..runs.recipe import read_value


class Contender(NamedTuple):
    """A method at a rank with options of its own, written ``name:option=value@rank``; the last two may be missing.

    An option with several values, written ``option=value/value``, holds a tuple: tuning chooses among them. What is
    trained has one value of each; that is a contender too, one of :meth:`settings`.
    """

    method: str
    rank: int
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = (f"{name}={'/'.join(map(_written, _several(value)))}" for name, value in self.options)
        return f"{':'.join((self.method, *options))}@{self.rank}"

    def settings(self) -> list[Contender]:
        """Every combination of one value per option, in the order written."""
        names = [name for name, _ in self.options]
        combinations = product(*(_several(value) for _, value in self.options))
        return [self._replace(options=tuple(zip(names, each, strict=True))) for each in combinations]

    def order(self) -> tuple[Any, ...]:
        """What contenders are sorted by; values of unlike types, such as null beside a number, have no order."""
        values = [(name, str(type(v)) if not isinstance(v, int | float) else "", v) for name, v in self.options]
        return self.method, self.rank, values


def parse_contender(text: str, rank: int) -> Contender:
    """Read ``name:option=value:…@rank``; without a rank of its own it has `rank`.

    Raises:
        ScaloraError: the rank is no whole number of at least 1, or an option has no value or one twice.
    """
    start, separator, own = text.partition("@")
    if separator and not (own.isdecimal() and int(own) >= 1):
        raise ScaloraError(f"--methods {text!r}: write method@rank with a whole rank, e.g. lora@16")
    name, *options = start.split(":")
    if name == "peft" and options:
        name = f"peft:{options.pop(0)}"
    pairs = []
    for option in options:
        key, separator, value = option.partition("=")
        if not (separator and key and all(value.split("/"))):
            raise ScaloraError(f"--methods {text!r}: write method:option=value, e.g. mora:type=1@8")
        if key in dict(pairs):
            raise ScaloraError(
                f"--methods {text!r}: {key} is there twice, and only one would count: leave one out, or write "
                f"{key}=value/value to have the better one chosen"
            )
        values = [read_value(each) for each in value.split("/")]
        if any(each in values[:place] for place, each in enumerate(values)):
            raise ScaloraError(f"--methods {text!r}: {key} has a value twice: give different ones")
        if any(isinstance(each, list | dict) or read_value(_written(each)) != each for each in values):
            raise ScaloraError(f"--methods {text!r}: the value of {key} must be a plain number or word")
        pairs.append((key, tuple(values) if len(values) > 1 else values[0]))
    return Contender(name, int(own) if own else rank, tuple(pairs))


def _written(value: Any) -> str:
    return "null" if value is None else str(value)  # as it is read


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
