"""A recipe: one YAML file that says what is trained, on what, how, and where the result goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..common.errors import ScaloraError
from ..common.files import path_text
from ..common.numeric import NO_NUMBER, numbers_only
from ..methods import MethodSpec
from ..models.packed import Quantization
from ..tasks import TaskSpec, all_tasks
from .stored import FLAGS, FORMERLY
from .training_section import read_training
from .yaml_words import load_yaml

_TYPE = re.compile(
    r"(str|int|float|bool|none|literal|list|dict|constrained-\w+|function-\w+)(\[.*\])?"
)  # pydantic's names


class Recipe(BaseModel):
    """Everything that decides the outcome of a run."""

    model_config = ConfigDict(extra="forbid")
    _numbers = model_validator(mode="before")(numbers_only)

    model: str = Field(description="Hub id, local folder, GGUF file, or the alias of a packaged model.")
    dtype: str = Field(default="float32", description="dtype of the base weights.")
    quantization: Quantization = Field(
        default="none",
        description="Of the base: nf4 (bitsandbytes), int8, float8 (torchao); nf4-rounded is NF4's values as floats.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="What products are computed in (autocast); auto is the device's fastest safe one."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="Values that replace those of the model's configuration, e.g. cls_dropout."
    )
    attn_implementation: str | None = Field(
        default=None, description="transformers' name of an attention kernel (eager, sdpa, …); None is its choice."
    )
    task: TaskSpec
    method: MethodSpec
    training: dict[str, Any] = Field(default_factory=dict, description="TrainingArguments by their own names.")
    head_learning_rate: float | None = Field(
        default=None, gt=0, allow_inf_nan=False,
        description="Learning rate of a classification head, which starts at random; None is training.learning_rate.",
    )  # fmt: skip
    score_batch_size: int = Field(default=32, ge=1, description="Sequences scored at a time.")
    output: str = Field(description="Folder for the results.")

    @field_validator("model", "output")
    @classmethod
    def _can_be_paths(cls, value: str) -> str:
        return path_text(value)

    @field_validator("method", mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("training")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return read_training(value)

    @model_validator(mode="after")
    def _one_precision(self) -> Recipe:
        """training.bf16 and training.fp16 are orders of a precision, and are kept as such."""
        flags = {flag: self.training.pop(flag) for flag in FLAGS if flag in self.training}
        for flag, on in sorted(flags.items(), key=lambda item: not item[1]):
            if self.precision == "auto" and (on or flag == "bf16"):
                self.precision = FLAGS[flag] if on else "float32"
            elif self.precision != "auto" and (self.precision == FLAGS[flag]) != on:
                raise ValueError(f"precision is {self.precision!r}, but training.{flag} is {on}: leave one of them out")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML file.
        overrides: ``key.subkey=value`` each, the value in YAML.

    Raises:
        ScaloraError: the file is missing or no YAML, or a key or value is wrong; the message names it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ScaloraError(f"recipe {path} cannot be read: {reason}; give the path of a YAML recipe") from error
    try:
        content = load_yaml(text)
    except yaml.YAMLError as error:
        raise ScaloraError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ScaloraError(f"recipe {path} must be a mapping with model, task, method and output, got {content!r:.60}")
    for override in overrides:
        put_override(content, override)
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe's content; raises ScaloraError naming the field."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ScaloraError(f"{where}: " + "; ".join(_explain(e) for e in error.errors()[:3])) from error


def read_value(text: str, within: Sequence[str] = ()) -> Any:
    """A value as a recipe would have it under the keys `within`; raises ScaloraError where it is not valid YAML."""
    try:
        return load_yaml(text, within)
    except yaml.YAMLError as error:
        raise ScaloraError(f"the value {text!r} is not valid YAML: {' '.join(str(error).split())}") from error


def put_override(content: dict[str, Any], override: str) -> None:
    """Put ``key.subkey=value`` into a recipe's content, in place; raises ScaloraError where it cannot be."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ScaloraError(f"--set {override!r}: write key=value, e.g. --set training.learning_rate=1e-3")
    *parents, last = key.split(".")
    place: dict[str, Any] = content
    for parent in parents:
        child: Any = place.get(parent)
        if isinstance(child, str) and parent == "method":
            child = {"name": child}
        place[parent] = child = {} if child is None else child
        if not isinstance(child, dict):
            raise ScaloraError(f"--set {override!r}: {parent} is {child!r}, which has no parts")
        place = child
    try:
        place[last] = read_value(value, key.split("."))
    except ScaloraError as error:
        raise ScaloraError(f"--set {override!r}: {error}") from error


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(_written(location))
    if error["type"] == "extra_forbidden" and location == [FORMERLY]:
        return f"{FORMERLY} is called quantization now: write nf4-rounded for nf4, none for float"
    if error["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        near = get_close_matches(location[-1], known, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {name!r}; {hint}"
    if error["type"] == NO_NUMBER:
        return ".".join((*_written(location), error["msg"]))
    if error["type"] == "missing":
        return f"key {name!r} is missing"
    if error["type"].startswith("union_tag"):
        return f"{name}.kind: {error['msg']}"
    if error["type"] == "value_error":  # ours, which names the value itself where that helps
        return ": ".join(filter(None, (name, error["msg"].removeprefix("Value error, "))))
    if error.get("input") is None:
        return f"{name} is empty: give it a value, or leave it out ({error['msg']})"
    return f"{name} is {error.get('input')!r:.60}: {error['msg']}"


def _written(location: list[str]) -> list[str]:
    """A location as the recipe has it: pydantic names which kind of task it is too, and which of several types."""
    if location[:1] == ["task"] and len(location) > 1 and location[1] in all_tasks():
        location = ["task", *location[2:]]
    return [part for part in location if not _TYPE.fullmatch(part)]


def _fields_at(location: list[str]) -> list[str]:
    """Names of the fields of the section at a location of a validation error."""
    from ..tasks.data.rows import DataSpec

    sections: dict[str, type[BaseModel]] = {
        **{kind: task.Spec for kind, task in all_tasks().items()},
        "method": MethodSpec,
        "data": DataSpec,
    }
    for part in reversed(location):
        if part in sections:
            return list(sections[part].model_fields)
    return list(Recipe.model_fields)
