"""What a method of the family is: it adapts a model, and says how to save and measure the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..common.errors import ScaloraError
from ..common.numeric import numbers_only
from ..models.heads import Head
from ..models.packed import LIBRARIES


class MethodSpec(BaseModel):
    """The ``method`` section of a recipe."""

    model_config = ConfigDict(extra="forbid")
    _numbers = model_validator(mode="before")(numbers_only)

    name: str = Field(description="One of `scalora methods`.")
    rank: int = Field(default=8, ge=1, description="r: columns of the trained adapters.")
    alpha: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="LoRA's alpha; None is twice the rank."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="LoRA's dropout.")
    target_modules: str | list[str] = Field(
        default="all-linear", description="Names of the modules to adapt, a regular expression, or 'all-linear'."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="The method's own options.")

    @property
    def scaled_alpha(self) -> float:
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def targets_hint(self) -> str:
        """What to say besides where ``target_modules`` matches nothing: a text is no list of names."""
        if not isinstance(self.target_modules, str):
            return ""
        return f"; a text is a regular expression for whole paths: for names write [{self.target_modules}]"


class Spectrum(NamedTuple):
    """Singular values of one layer's whole update so far, descending, and the weight's shape m×n."""

    sigma: Tensor
    m: int
    n: int

    @classmethod
    def of(cls, update: Tensor) -> Spectrum:
        """Of a dense update (m, n), float32: from its smaller Gram matrix in float64, cheaper than an SVD.

        What squaring loses there, below 1e-6 of the largest value, is rounding in float32 anyway.
        """
        m, n = update.shape
        wide = (update if m <= n else update.mT).double()
        return cls(torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0).sqrt().flip(-1).float(), m, n)


@dataclass
class Adapted:
    """A model ready to be trained by a method.

    ``save`` writes what the user takes away into a folder that does not exist yet, and returns the lines of
    Python that load it. ``spectra`` yields (layer name, :class:`Spectrum`); whoever wants it calls ``remember`` before
    training. ``split_train`` is given the training set before training, where the method needs a part for itself, and
    returns the rest. ``optimizer`` makes the optimizer of all that is trained from Trainer's arguments, where the
    method has its own; one that clips gradients itself sets their ``max_grad_norm`` to 0. Where ``used_up``, ``save``
    takes the model apart, which must be scored and measured before.
    """

    model: nn.Module
    save: Callable[[Path], list[str]]
    spectra: Callable[[], Iterator[tuple[str, Spectrum]]]
    callbacks: list[TrainerCallback] = field(default_factory=list)
    split_train: Callable[[Any], Any] | None = None
    remember: Callable[[], None] | None = None
    optimizer: Callable[[TrainingArguments], Optimizer] | None = None
    used_up: bool = False


class Family(Enum):
    """What a method changes, as a reader is told; methods are listed in this order."""

    PEFT = "LoRA, and adapters as PEFT has them"
    LAYERS = "Adapters with layers of our own"
    OURS = "ScaLoRA, and what grew from it"
    START = "LoRA that starts elsewhere"
    PAIRS = "LoRA by an optimizer of its own"
    AROUND = "LoRA with more done at each step of the recipe's optimizer"
    WHOLE = "The weights themselves"
    BASE = "LoRA on a quantised base of its own"


class NoOptions(BaseModel):
    """For methods without options of their own."""

    model_config = ConfigDict(extra="forbid")


class Method(ABC):
    """One method; a file in this package lists its methods in ``METHODS`` and is found by that."""

    name: ClassVar[str]
    summary: ClassVar[str]
    family: ClassVar[Family]
    Options: ClassVar[type[BaseModel]] = NoOptions
    Wrapper: ClassVar[type[nn.Module] | None] = None  # its own layers around linear ones, where it has such
    lr_factor: ClassVar[float] = 1.0  # its usual learning rate, relative to LoRA's
    has_alpha: ClassVar[bool] = True  # alpha means something to it
    quantises: ClassVar[bool] = False  # it makes the NF4 base itself, of the float weights
    shards: ClassVar[bool] = False  # it trains matrices of which FSDP2 gives each process a part
    alone: ClassVar[bool] = False  # it trains in one process only
    resumes: ClassVar[bool] = True  # a run goes on from its checkpoints, and its model may be that of one
    packed: ClassVar[tuple[str, ...]] = tuple(LIBRARIES)  # ways to keep the base in few bits that it trains on

    def __init__(self, spec: MethodSpec) -> None:
        self.spec = spec
        try:
            numbers_only(self.Options, spec.options)
        except ValueError as error:
            raise ScaloraError(f"method.options.{error}") from None
        try:
            self.options = self.Options(**spec.options)
        except ValidationError as error:
            first = error.errors()[0]
            field_name = ".".join(str(part) for part in first["loc"]) or "options"
            fields = list(self.Options.model_fields)
            known = f"(its options: {', '.join(fields) or 'none'})"
            if first["type"] == "extra_forbidden":
                near = get_close_matches(field_name, fields, 1, 0.8)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ScaloraError(
                    f"method.options.{field_name}: {self.name} has no such option{meant} {known}"
                ) from error
            raise ScaloraError(f"method.options.{field_name} of {self.name}: {first['msg']} {known}") from error

    @property
    def alpha(self) -> float | None:
        """LoRA's alpha as it is used; None where the method has none."""
        return self.spec.scaled_alpha if self.has_alpha else None

    def check(self, arguments: TrainingArguments) -> None:
        """Raise ScaloraError where Trainer's arguments are seen not to suit, before anything takes long."""
        if arguments.load_best_model_at_end and not self.resumes:
            raise ScaloraError(
                f"training.load_best_model_at_end is true, but {self.name} cannot go back to a checkpoint: leave it out"
            )

    def check_resuming(self) -> None:
        """Raise ScaloraError where no run of the method goes on from a checkpoint."""
        if not self.resumes:
            raise ScaloraError(
                f"method.name is {self.name!r}, whose checkpoints lack what its next steps depend on, so that a run "
                "cannot be resumed: start anew (--overwrite)"
            )

    @abstractmethod
    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        """Adapt a freshly loaded model in place.

        Raises:
            ScaloraError: the model has no such modules, or the rank is too large for one of them.
        """
