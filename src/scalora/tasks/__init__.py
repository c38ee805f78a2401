"""Tasks by the kind of a recipe's `task` section. Adding one means adding a file that lists it in ``TASKS``."""

from __future__ import annotations

import pkgutil
from functools import cache, reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

from ..common.errors import ScaloraError
from .task import BaseTaskSpec, Prediction, Score, Split, Task

__all__ = ["Prediction", "Score", "Split", "Task", "TaskSpec", "all_tasks", "build_task", "task_class"]


@cache
def all_tasks() -> dict[str, type[Task]]:
    """Every task by its kind, in the order of files and of their ``TASKS``."""
    modules = (import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__))
    return {task.kind(): task for module in modules for task in getattr(module, "TASKS", ())}


def task_class(kind: str) -> type[Task]:
    """The task of this kind; raises ScaloraError where there is none."""
    if kind not in all_tasks():
        raise ScaloraError(f"task.kind is {kind!r}: choose one of {', '.join(all_tasks())}")
    return all_tasks()[kind]


def build_task(spec: BaseTaskSpec) -> Task:
    """The task that `spec` describes. Nothing is loaded yet; raises ScaloraError for a spec that contradicts itself."""
    return task_class(spec.kind)(spec)


if TYPE_CHECKING:
    TaskSpec: TypeAlias = BaseTaskSpec
else:
    TaskSpec = Annotated[reduce(or_, (task.Spec for task in all_tasks().values())), Field(discriminator="kind")]
    """What a recipe's `task` section may be; its `kind` says which."""
