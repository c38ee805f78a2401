"""Optimizer steps in white coordinates (:mod:`algebra.whitening`): LoRA's layers, matrices and optimizer as they are.

Before the update the gradients of A and B become those of Ã = N A and B̃ = M B. The optimizer makes its step of them,
and after it the step is taken back: ΔA = N⁻¹ΔÃ, ΔB = M⁻¹ΔB̃. The state is of the white coordinates, and column scaling
carries it along as in plain ones. When the coordinates turn, once a look, means of gradients turn along; second moments
stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...algebra.precision import exact_matmul
from ...common.errors import ScaloraError
from ...layers.layout import as_matrix
from ...layers.peft_lora import AdapterLayer
from ...layers.sharding import copy_into, gather_full, is_sharded
from ..groups import Group
from ..optimizer_rules import decay_rates, state_rule
from ..optimizers import gradient_moments
from .moments import Moments, White, due

_LEFT: WeakKeyDictionary[Optimizer, Moments] = WeakKeyDictionary()  # coordinates that an optimizer's state is of


def _left(optimizer: Optimizer) -> Moments | None:
    """The coordinates that an optimizer was detached in, if it has a state that is of them."""
    return _LEFT.get(optimizer) if any(optimizer.state.values()) else None


def refuse_left(optimizer: Optimizer) -> None:
    """Raise ScaloraError where an optimizer that is to go on in plain coordinates was detached in white ones."""
    if _left(optimizer):
        raise ScaloraError(
            "this optimizer has made steps in white coordinates, and its means of gradients are of these: go on with "
            "a new optimizer, or with coordinates='white'"
        )


class WhiteSteps:
    """What :class:`scalora.engine.event.ScaLora` does before and after every step.

    Raises:
        ScaloraError: the optimizer's means of gradients cannot be turned along, or they are of other coordinates.
    """

    def __init__(self, layers: Sequence[AdapterLayer], optimizer: Optimizer, exponent: float) -> None:
        state_rule(optimizer, one_factor=True, turned=True)
        self.moments = Moments(layers, exponent)
        if former := _left(optimizer):
            self.moments.follow(former)
        _LEFT.pop(optimizer, None)
        self.optimizer = optimizer
        self._before: list[list[Tensor]] = []
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        self._hook.remove()
        self.moments.detach()
        _LEFT[self.optimizer] = self.moments

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
        gradients, values = [], []
        for g, group in enumerate(self.moments.groups):
            params = _parameters(group)
            full = gather_full([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
            for p, value in zip(params, self._whitened(g, *_stacked(full)), strict=True):
                if p.grad is not None:
                    gradients.append(p.grad)
                    values.append(value)
        copy_into(gradients, values)

    def _whitened(self, group: int, of_A: Tensor, of_Bt: Tensor) -> list[Tensor]:
        """N⁻¹X of X (L, m, r) and X M⁻¹ of X (L, r, n), matrix by matrix; each lies there whole."""
        outputs, inputs = self.moments.inverse(group)
        X, Xt = outputs.times(of_A.to(outputs.U)), inputs.times(of_Bt.mT.to(inputs.U)).mT
        return [*X.to(of_A.dtype).contiguous(), *Xt.to(of_Bt.dtype)]

    def _turn(self, former: Sequence[White]) -> None:
        """Means of gradients go over into the present coordinates: N⁻¹N' of the former N'. A collective."""
        for group, old, new in zip(self.moments.groups, former, self.moments.white, strict=True):
            for params, before, now, tall in (
                ([layer.A for layer in group.layers], old.outputs, new.outputs, True),
                ([layer.Bt for layer in group.layers], old.inputs, new.inputs, False),
            ):
                with gradient_moments(self.optimizer, params, 1) as means:
                    found = [(i, state) for i, of_param in enumerate(means) for state in of_param]
                    if not found:
                        continue
                    members, states = zip(*found, strict=True)
                    X = torch.stack([as_matrix(state) for state in gather_full(states)]).to(before.U)
                    if len(members) != len(params) or len(set(members)) != len(params):  # one of each, as a rule
                        before, now = before.at(members), now.at(members)
                    X = now.whiten(before.color(X if tall else X.mT))
                    copy_into(states, [*(X.contiguous() if tall else X.mT)])

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
            untouched = (torch.stack(A) == 0).flatten(1).all(1).tolist()
            for layer, zero, b in zip(group.layers, untouched, drawn, strict=True):
                if layer.A.grad is not None and layer.Bt.requires_grad and zero:
                    copy_into([layer.Bt.detach()], [b])
                    layer.A.grad.zero_()

    @torch.no_grad()
    def remember(self) -> None:
        """To be called after all events: what changes from here on is the optimizer's step."""
        self._before = [_copies(_parameters(group)) for group in self.moments.groups]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with exact_matmul(self.moments.white[0].inputs.U.device):  # a step taken inside autocast
            self._take_back(optimizer)

    @torch.no_grad()
    def _take_back(self, optimizer: Optimizer) -> None:
        """What the optimizer has changed becomes ΔA = N⁻¹ΔÃ and ΔB = M⁻¹ΔB̃. A collective."""
        params, values = [], []
        decays = decay_rates(optimizer)
        for g, (group, before) in enumerate(zip(self.moments.groups, self._before, strict=False)):
            own = _parameters(group)
            full, wide = gather_full([*(p.detach() for p in own), *before]), self.moments.white[g].inputs.U.dtype
            now, then = ([part.to(wide) for part in _stacked(half)] for half in (full[: len(own)], full[len(own) :]))
            then = self._decayed([decays.get(p, 0) for p in own], then)
            steps = self._whitened(g, *(n - t for n, t in zip(now, then, strict=True)))
            params += own
            values += torch._foreach_add([*then[0], *then[1]], steps)
        copy_into([p.detach() for p in params], values)
        self._before = []

    def _decayed(self, rates: Sequence[Any], then: Sequence[Tensor]) -> list[Tensor]:
        """What weight decay left of A (L, m, r) and Bᵀ (L, r, n) as they were: Ã decays as A does, unlike its step."""
        # A loss scaler may have the optimizer itself skip the step, which leaves everything as it was.
        skipped = getattr(self.optimizer, "found_inf", None)
        left: list[Tensor] = []
        for part, of_each in zip(then, (rates[: len(rates) // 2], rates[len(rates) // 2 :]), strict=True):
            rate = of_each[0]
            if any(other is not rate and other != rate for other in of_each):
                rate = part.new_tensor([float(each) for each in of_each])[:, None, None]
            if isinstance(skipped, Tensor):
                rate = rate * (skipped == 0).to(part)
            left.append(part if isinstance(rate, int | float) and rate == 0 else part * (1 - rate))
        return left


def _parameters(group: Group) -> list[nn.Parameter]:
    """A of every layer, then Bᵀ of every layer."""
    return [layer.A for layer in group.layers] + [layer.Bt for layer in group.layers]


def _copies(params: Sequence[Tensor]) -> list[Tensor]:
    """Of the parameters of a group, in two operations where each process has all of them."""
    params = [p.detach() for p in params]
    if any(is_sharded(p) for p in params):
        return [p.clone() for p in params]
    half = len(params) // 2
    return [*torch.stack(params[:half]), *torch.stack(params[half:])]


def _stacked(full: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The first half, each m×r, and the second, each r×n: (L, m, r) and (L, r, n)."""
    half = len(full) // 2
    of_A, of_Bt = (torch.stack([as_matrix(t) for t in part]) for part in (full[:half], full[half:]))
    return of_A, of_Bt
