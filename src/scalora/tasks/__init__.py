"""Tasks: data and metric of a problem, built from a recipe's `task` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import Prediction, Score, Split, Task
from .classification import ClassificationSpec, ClassificationTask
from .completion import CompletionSpec, CompletionTask
from .multiple_choice import MultipleChoiceSpec, MultipleChoiceTask
from .vectors import VectorsSpec, VectorsTask

TaskSpec = Annotated[
    MultipleChoiceSpec | CompletionSpec | ClassificationSpec | VectorsSpec, Field(discriminator="kind")
]
"""What a recipe's `task` section may be; its `kind` says which."""


def build_task(spec: MultipleChoiceSpec | CompletionSpec | ClassificationSpec | VectorsSpec) -> Task:
    """The task that `spec` describes. Nothing is loaded yet; raises ScaloraError for a spec that contradicts itself."""
    if isinstance(spec, MultipleChoiceSpec):
        return MultipleChoiceTask(spec)
    if isinstance(spec, CompletionSpec):
        return CompletionTask(spec)
    if isinstance(spec, VectorsSpec):
        return VectorsTask(spec)
    return ClassificationTask(spec)


__all__ = [
    "ClassificationSpec",
    "CompletionSpec",
    "MultipleChoiceSpec",
    "Prediction",
    "Score",
    "Split",
    "Task",
    "TaskSpec",
    "VectorsSpec",
    "build_task",
]
