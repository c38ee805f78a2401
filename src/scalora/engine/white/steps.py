"""Optimizer steps in white coordinates (:mod:`algebra.whitening`): LoRA's layers, matrices and optimizer as they are.

Before the update the gradients of A and B become those of Ã = N A and B̃ = M B. The optimizer makes its step of them,
and after it the step is taken back: ΔA = N⁻¹ΔÃ, ΔB = M⁻¹ΔB̃. The state is of the white coordinates, and column scaling
carries it along as in plain ones. When the coordinates turn, once a look, means of gradients turn along; second moments
stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...layers.layout import as_matrix
from ...layers.peft_lora import AdapterLayer
from ...layers.sharding import copy_into, gather_full
from ..groups import Group
from ..optimizers import linear_state
from .moments import Moments, White, due


class WhiteSteps:
    """What :class:`scalora.engine.event.ScaLora` does before and after every step."""

    def __init__(self, layers: Sequence[AdapterLayer], optimizer: Optimizer) -> None:
        self.moments = Moments(layers)
        self.moments.open()
        self.optimizer = optimizer
        self._before: list[list[Tensor]] = []
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        self._hook.remove()
        self.moments.detach()

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """The gradients become those of the white coordinates; to be called before any event. A collective."""
        former = list(self.moments.white)
        if self.moments.close():
            self._turn(former)
        if step == 0:
            self._begin()
        if due(step):
            self.moments.open()
        for group, white in zip(self.moments.groups, self.moments.white, strict=True):
            params = _parameters(group)
            gradients = gather_full([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
            found = zip(params, _whitened([as_matrix(g) for g in gradients], white), strict=True)
            used = [(p.grad, value) for p, value in found if p.grad is not None]
            copy_into([gradient for gradient, _ in used], [value for _, value in used])

    def _turn(self, former: Sequence[White]) -> None:
        """Means of gradients go over into the present coordinates: N⁻¹N' of the former N'. A collective."""
        for group, old, new in zip(self.moments.groups, former, self.moments.white, strict=True):
            for params, before, now, tall in (
                ([layer.A for layer in group.layers], old.outputs, new.outputs, True),
                ([layer.Bt for layer in group.layers], old.inputs, new.inputs, False),
            ):
                found = [(i, state) for i, p in enumerate(params) for state in linear_state(self.optimizer, p)]
                if not found:
                    continue
                members, states = zip(*found, strict=True)
                X = torch.stack([as_matrix(state) for state in gather_full(states)]).to(before.U)
                X = now.at(members).whiten(before.at(members).color(X if tall else X.mT))
                copy_into(states, [*(X if tall else X.mT)])

    def _begin(self) -> None:
        """Where A is still zero, B becomes M⁻¹B: what is drawn at random is drawn in white coordinates. A collective.

        The gradient of A was that for the former B: it becomes zero, so that A waits for the next step.
        """
        for group, white in zip(self.moments.groups, self.moments.white, strict=True):
            A, Bt = (
                [as_matrix(p) for p in gather_full([p.detach() for p in part])]
                for part in ([x.A for x in group.layers], [x.Bt for x in group.layers])
            )
            drawn = white.inputs.whiten(torch.stack(Bt).to(white.inputs.U).mT).mT
            for layer, a, b in zip(group.layers, A, drawn, strict=True):
                if layer.A.grad is not None and layer.Bt.requires_grad and not a.any():
                    copy_into([layer.Bt.detach()], [b])
                    layer.A.grad.zero_()

    @torch.no_grad()
    def remember(self) -> None:
        """To be called after all events: what changes from here on is the optimizer's step."""
        self._before = [[p.detach().clone() for p in _parameters(group)] for group in self.moments.groups]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        groups = zip(self.moments.groups, self.moments.white, self._before, strict=False)
        for group, white, before in groups:
            params = [p.detach() for p in _parameters(group)]
            now, then = ([as_matrix(t) for t in gather_full(tensors)] for tensors in (params, before))
            wide = white.inputs.U.dtype
            steps = _whitened([n.to(wide) - t.to(wide) for n, t in zip(now, then, strict=True)], white)
            copy_into(params, [t.to(wide) + d for t, d in zip(then, steps, strict=True)])
        self._before = []


def _parameters(group: Group) -> list[nn.Parameter]:
    """A of every layer, then Bᵀ of every layer."""
    return [layer.A for layer in group.layers] + [layer.Bt for layer in group.layers]


def _whitened(tensors: Sequence[Tensor], white: White) -> list[Tensor]:
    """N⁻¹X of the first half, each m×r, and X M⁻¹ of the second, each r×n."""
    half = len(tensors) // 2
    of_A, of_Bt = (torch.stack(list(part)).to(white.inputs.U) for part in (tensors[:half], tensors[half:]))
    return [*white.outputs.whiten(of_A), *white.inputs.whiten(of_Bt.mT).mT]
