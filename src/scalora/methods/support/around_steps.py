"""What methods share that are LoRA, the recipe's optimizer, and something done before or after each of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from ...common.errors import ScaloraError
from ...engine.groups import Group, grouped
from ...engine.optimizer_rules import state_rule
from ...engine.optimizers import gradient_moments, innermost
from ...layers.peft_lora import AdapterLayer, find_layers
from ...layers.sharding import copy_into, gather_full
from ...models.heads import Head
from ..lora import lora_spectra, save_plain
from ..method import Adapted

Carried = Literal["none", "first", "both"]  # moments of the optimizer that move along with the matrices


class AroundSteps(TrainerCallback):
    """Calls :meth:`before` and :meth:`after` around every optimizer step of a training, gradients clipped already."""

    carries_state = False  # whether the optimizer's state must be one that can be carried along

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.step = 0  # optimizer steps taken
        self.hooks: list[Any] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.optimizer = innermost(kwargs["optimizer"])
        if self.carries_state:
            refuse_unknown_state(self.optimizer, args)
        self.layers: list[AdapterLayer] = find_layers(self.model)
        self.step = state.global_step
        self.begin(args, state.max_steps)
        self.hooks = [
            self.optimizer.register_step_pre_hook(lambda *_: self._call(self.before)),
            self.optimizer.register_step_post_hook(lambda *_: self._call(self.after)),
        ]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step = state.global_step

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def _call(self, part: Any) -> None:
        part()

    def begin(self, args: TrainingArguments, steps: int) -> None:
        """Before the first step of a run, or of its continuation; ``steps`` are those of the whole run."""

    def before(self) -> None:
        """Before step number ``self.step``, from 0."""

    def after(self) -> None:
        """After it; ``self.step`` is still its number."""

    @property
    def groups(self) -> list[Group]:
        """The layers by shape, with their parameters as they are now."""
        return grouped(self.layers)


def around_lora(model: PeftModel, head: Head, callback: AroundSteps) -> Adapted:
    """A LoRA model that is trained with ``callback``, and saved as the plain LoRA that it is."""
    return Adapted(model, lambda path: save_plain(model, head, path), lambda: lora_spectra(model), [callback])


def refuse_unknown_state(optimizer: Optimizer, args: TrainingArguments) -> None:
    """Raise ScaloraError where no rule is known for carrying this optimizer's state along."""
    try:
        state_rule(optimizer, turned=True)
    except ScaloraError as error:
        raise ScaloraError(
            f"training.optim is {OptimizerNames(args.optim).value!r}, which this method cannot use: {error}"
        ) from error


def gathered(params: Sequence[Tensor]) -> Tensor:
    """Parameters of one shape, whole, stacked: (L, …). A collective where they are sharded."""
    return torch.stack(gather_full([p.detach() for p in params]))


def turn_parameters(group: Group, of_A: Tensor, of_B: Tensor) -> None:
    """A ← A T and B ← B T', in float64 and rounded once; T, T' (L, r, r), float64. A collective."""
    A, B = gathered(group.A).double() @ of_A, gathered(group.Bt).mT.double() @ of_B
    copy_into([*group.A, *group.Bt], [*A.to(group.A[0]), *B.mT.to(group.Bt[0])])


def turn_state(optimizer: Optimizer, group: Group, of_A: Tensor, of_B: Tensor, carried: Carried) -> None:
    """Carry the state along where the gradient of A became g_A T, that of B g_B T'. A collective.

    Means of gradients are linear in them. Of means of their squares the entries between columns are not known: T∘T is
    what is left of the map, exact where it only scales, permutes and flips columns.

    Args:
        optimizer: one that :func:`refuse_unknown_state` accepts.
        group: L layers of one shape.
        of_A: T, (L, r, r).
        of_B: T', likewise.
        carried: which moments.
    """
    powers = {"none": (), "first": (1,), "both": (1, 2)}[carried]
    for params, maps, tall in ((group.A, of_A, True), (group.Bt, of_B, False)):
        for power in powers:
            with gradient_moments(optimizer, params, power) as found:
                members = [i for i, states in enumerate(found) for _ in states]
                if not members:
                    continue
                states = [each for of_param in found for each in of_param]
                X = gathered(states)
                X = (X if tall else X.mT) @ maps.pow(power)[members].to(X)
                copy_into(states, [*(X if tall else X.mT)])
