"""What a user can set, with the meaning of every field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from ..algebra.scaling import ScalingMethod
from ..algebra.whitening import EXPONENT
from ..common.errors import ScaloraError, named
from ..layers.kept_sum import KeptSum

MOST = 50  # steps from one refresh to the next, where the length of the run chooses it
_NEAR = 0.8  # of two names, so that one is taken for the other's misspelling: foo is not for floor
Accumulate = Literal["adapter", "base"]
Coordinates = Literal["plain", "white"]
Unsupported = Literal["refuse", "leave"]


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class ScaLoraConfig:
    """Settings of ScaLoRA (arXiv 2510.23818); the defaults need no tuning.

    Raises:
        ScaloraError: a value is out of range, or there is no such field; the message names field, value and range.
    """

    def __new__(cls, *values: Any, **settings: Any) -> ScaLoraConfig:  # dataclasses would raise a TypeError
        if values:
            raise ScaloraError(f"ScaLoraConfig was given {named(values[0])} without a name: write interval=10, e.g.")
        refuse_unknown(settings)
        return super().__new__(cls)

    interval: int | None = _help(
        10,
        "Optimizer steps from one rescaling to the next; 1 is the paper's ScaLoRA, 10 its ScaLoRA-I. None: no column "
        "is rescaled.",
    )
    refresh: int | Literal["auto"] | None = _help(
        None,
        "Optimizer steps from one refresh to the next: new adapters along the gradient's top singular directions "
        "(Theorem 1), the old ones' update kept. 'auto': a quarter of the run, 50 at most, where a Trainer runs it. "
        "None: never.",
    )
    coordinates: Coordinates = _help(
        "plain",
        "What the optimizer makes its steps in: 'plain' (the entries of the matrices) or 'white' (in which what all of "
        "the layer's inputs, and all gradients of its outputs, have in common counts less; from sketches).",
    )
    exponent: float = _help(
        EXPONENT,
        "How far white coordinates go: of the second moments of inputs and output gradients. 0.25 divides gradients by "
        "the root of their second moments, as Adam does; 0.5 by these themselves, as natural gradients do.",
    )
    scaling: ScalingMethod = _help(
        "paper",
        "How the factors are found: 'paper' (Theorem 5 where all its factors are positive, else Theorem 3), "
        "'nonnegative' (the constrained optimum, in every layer), 'scalar' (Theorem 3 only) or "
        "'normalize' (every column to norm sqrt(c), an ablation).",
    )
    lipschitz: float | None = _help(
        None,
        "L of c = 1/(L*lr), with the base learning rate at attach time. None calibrates c per layer at the first "
        "rescaling, so that the adapters keep their initial scale: nothing to tune.",
    )
    accumulate: Accumulate = _help(
        "adapter",
        "Where the moved differences go: 'adapter' (frozen columns beside the adapter's own; the base model is never "
        "written) or 'base' (added to the base weights, as in the paper).",
    )
    capacity: int | None = _help(
        None,
        "Accumulated columns that a layer keeps when they are recompressed; None is 8 times the LoRA rank. More than "
        "the widest layer has singular values are not made.",
    )
    keep_sums: bool | None = _help(
        None,
        "Whether a layer keeps the sum of its weight and the accumulated columns while it trains, in the dtype that it "
        "computes in: a step then takes LoRA's time, for one more copy of the weight. None: where the weight is in 32 "
        "bits, True: in half precision too (not quantised ones), False: nowhere.",
    )
    floor: float = _help(1e-2, "No rescaled column ends with a norm under floor*sqrt(c): a zero column never recovers.")
    unsupported: Unsupported = _help(
        "refuse",
        "Layers that cannot be rescaled exactly (DoRA and other variants, lora_bias, ...): 'refuse' the model, or "
        "'leave' them, so that they train as PEFT's plain LoRA beside the others.",
    )

    def __post_init__(self) -> None:
        if self.interval is not None:
            _require_int("interval", self.interval, 1)
        if self.refresh is not None and self.refresh != "auto":
            _require_int("refresh", self.refresh, 2, " or 'auto'")
        _require_choice("coordinates", self.coordinates, get_args(Coordinates))
        if not (_is_number(self.exponent) and 0 < self.exponent <= 0.5):
            raise ScaloraError(f"exponent is {self.exponent!r}: it must be more than 0, and 0.5 at most")
        if self.exponent != EXPONENT and self.coordinates == "plain":
            raise ScaloraError(
                f"exponent is {self.exponent:g}, but coordinates is 'plain', which has none: set coordinates='white', "
                "or leave exponent out"
            )
        if not self.has_events:
            if self.coordinates == "plain":
                raise ScaloraError(
                    "interval and refresh are both None and coordinates is 'plain': that is plain LoRA; set one of them"
                )
            if self.accumulate == "base" or self.capacity is not None:
                what = f"capacity is {self.capacity}" if self.accumulate == "adapter" else "accumulate is 'base'"
                raise ScaloraError(
                    f"{what}, but interval and refresh are both None, so that nothing is accumulated: set one of them, "
                    "or leave it out"
                )
        _require_choice("scaling", self.scaling, get_args(ScalingMethod))
        _require_choice("accumulate", self.accumulate, get_args(Accumulate))
        _require_choice("unsupported", self.unsupported, get_args(Unsupported))
        if self.lipschitz is not None and not (_is_number(self.lipschitz) and self.lipschitz > 0):
            raise ScaloraError(f"lipschitz is {self.lipschitz!r}: it must be a positive number, or None to calibrate c")
        if self.capacity is not None:
            _require_int("capacity", self.capacity, 1)
            if self.accumulate == "base":
                raise ScaloraError(
                    f"capacity is {self.capacity} but accumulate='base' keeps no columns: leave capacity out"
                )
        if not isinstance(self.keep_sums, bool | None):
            raise ScaloraError(f"keep_sums is {self.keep_sums!r}: it must be true, false or None")
        if not (_is_number(self.floor) and 0 < self.floor < 1):
            raise ScaloraError(f"floor is {self.floor!r}: it must lie between 0 and 1 (both excluded)")

    def of_run(self, steps: int) -> ScaLoraConfig:
        """These settings in a run of so many optimizer steps: what ``refresh='auto'`` stands for there."""
        return replace(self, refresh=max(2, min(MOST, steps // 4))) if self.refresh == "auto" else self

    @property
    def period(self) -> int | None:
        """``refresh`` as a number of steps.

        Raises:
            ScaloraError: it is 'auto', and nobody has said how long the run is.
        """
        if isinstance(self.refresh, str):
            raise ScaloraError(
                f"refresh is {self.refresh!r}, a quarter of the run, whose length only a Trainer tells: give a number "
                f"of steps here, {MOST} at most"
            )
        return self.refresh

    @property
    def sketched(self) -> bool:
        """Whether sketches are made of what each layer reads and of its outputs' gradients."""
        return self.refresh is not None or self.coordinates == "white"

    @property
    def has_events(self) -> bool:
        """Whether anything is moved out of the adapters."""
        return self.interval is not None or self.refresh is not None

    @property
    def kept_sum(self) -> KeptSum | None:
        """What each layer keeps a sum with; None where none is to be kept."""
        steps = min(filter(None, (self.interval, self.period)), default=0)
        return KeptSum(steps, half=self.keep_sums is True) if steps and self.keep_sums is not False else None

    @property
    def one_factor(self) -> bool:
        """Whether events, where there are any, multiply all columns of a matrix by one number."""
        return self.interval is None or self.scaling == "scalar"

    @property
    def columns(self) -> int | None:
        """``capacity``, or 0 where nothing is accumulated."""
        return self.capacity if self.has_events else 0


def as_config(value: ScaLoraConfig | Mapping[str, Any] | None) -> ScaLoraConfig:
    """Settings as they are given to us: made already, as the fields of a JSON object, or left out.

    Raises:
        ScaloraError: they are something else, or a field is unknown or out of range.
    """
    if value is None:
        return ScaLoraConfig()
    if isinstance(value, ScaLoraConfig):
        return value
    if not isinstance(value, Mapping):
        raise ScaloraError(f"config is {named(value)}: give a ScaLoraConfig, or a dict of its fields")
    refuse_unknown(value)
    return ScaLoraConfig(**value)


def refuse_unknown(settings: Mapping[Any, Any]) -> None:
    """Refuse what is no field of ScaLoraConfig, with the field that it resembles."""
    known = [each.name for each in fields(ScaLoraConfig)]
    for name in settings:
        if name not in known:
            near = get_close_matches(str(name), known, 1, _NEAR)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ScaloraError(f"config has a field {name!r}{meant}: ScaLoraConfig's are {', '.join(known)}")


def refuse_settings(settings: Mapping[str, Any]) -> None:
    """Refuse ScaLoraConfig's fields where a ScaLoraConfig belongs."""
    known = [each.name for each in fields(ScaLoraConfig)]
    for name, value in settings.items():
        if near := get_close_matches(name, known, 1, _NEAR):
            raise ScaloraError(
                f"{name}={named(value)} was given by itself: write config=ScaLoraConfig({near[0]}={named(value)})"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_int(name: str, value: object, least: int, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ScaloraError(f"{name} is {value!r}: it must be a whole number of at least {least}{otherwise}")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ScaloraError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
