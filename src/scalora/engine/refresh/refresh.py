"""Every N optimizer steps: new adapters along the gradient's top singular directions (Theorem 1 of arXiv 2510.23818).

All steps between two refreshes gather sketches of the gradient (:mod:`.sketch`): the first half GΩ, the second, on
other batches, GᵀQ, each of 2r columns. At the refresh, before the optimizer's update, the adapters become singular
directions of QZᵀ, s(AB^T − ÃB̃ᵀ) goes to the store so that the model's function stays, Ã and B̃ get the gradients that
the sketches hold, and the optimizer's state of these two matrices starts anew. Where N is long enough, w = N/6 steps
after it, at most WARMUP, are shortened, the first to 1/(w + 1): Adam's first steps from an empty state are all of full
length, whatever the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...algebra.directions import Directions, optimal_adapters, range_basis, sketched_svd
from ...algebra.whitening import white_adapters
from ...common.errors import ScaloraError
from ...layers.peft_lora import AdapterLayer
from ...layers.sharding import copy_into, local_shard
from ..groups import Gathered, Group, gather_group, grouped, on_device
from ..optimizer_rules import state_rule
from ..optimizers import forget
from ..stores import Store, whole_updates
from ..white.moments import Moments
from ..whole import whole
from .sketch import Sketch

WARMUP = 4  # steps after a refresh that are shortened, at most; and at most a sixth of all


class _Part(NamedTuple):
    """Layers of one shape: what they are, and what they become."""

    layers: list[AdapterLayer]
    now: Gathered
    new: Directions


class Refresh:
    """What :class:`scalora.engine.event.ScaLora` does every ``every`` steps, and before and after.

    Raises:
        ScaloraError: a layer has no 2r singular directions, or the optimizer cannot start anew for some parameters.
    """

    def __init__(
        self,
        layers: Sequence[AdapterLayer],
        optimizer: Optimizer,
        store: Store,
        every: int,
        constants: Tensor,
        white: Moments | None,
    ) -> None:
        if state_rule(optimizer, one_factor=True).counts_by_group:
            raise ScaloraError(
                f"refresh={every} lets the optimizer's state of the adapters start anew, but "
                f"{type(optimizer).__name__} counts its steps for all parameters together: leave refresh out, or use "
                "AdamW from torch.optim"
            )
        for layer in layers:
            m, n = layer.shape
            if 2 * layer.rank > min(m, n):
                raise ScaloraError(
                    f"refresh={every} needs two times rank {layer.rank} singular directions, but layer {layer.name} is "
                    f"{m}×{n}: choose {min(m, n) // 2} or less, or leave the layer out of target_modules"
                )
        self.layers = list(layers)
        self.optimizer = optimizer
        self.store = store
        self.every = every
        self.constants = constants  # c/s² per layer
        self.sketch = Sketch(self.layers)
        self.white = white
        self.warmup = min(WARMUP, every // 6)
        self.since = self.warmup  # steps since the last refresh, as far as it matters
        self.steps: list[int] = []  # at which adapters were refreshed
        self._before: list[Tensor] = []
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        self._hook.remove()
        self.sketch.close()

    @torch.no_grad()
    def before_step(self, step: int) -> bool:
        """To be called before every update, with the step's gradients in place; whether adapters were refreshed."""
        self.sketch.gather()
        self.since += 1
        refreshed = step > 0 and step % self.every == 0 and self.sketch.side == "right"
        if refreshed:
            self.refresh(self.sketch.fixed(), self.sketch.close())
            self.steps.append(step)
            self.since = 0
        if step % self.every == 0:
            self.sketch.open("left", self._drawn(step))
        elif step % self.every == self.every // 2 and self.sketch.side == "left":
            self.sketch.open("right", self._found(self.sketch.close()))
        return refreshed

    @torch.no_grad()
    def remember(self) -> None:
        """To be called after all events: what changes from here on is the update, which may be shortened."""
        if self.since < self.warmup:
            params = self._params()
            self._before = [torch.empty_like(p) for p in params]
            torch._foreach_copy_(self._before, params)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._before:
            params = self._params()
            torch._foreach_copy_(
                params, torch._foreach_lerp(self._before, params, (self.since + 1) / (self.warmup + 1))
            )
            self._before = []

    def _params(self) -> list[Tensor]:
        return [local_shard(p) for layer in self.layers for p in (layer.A.detach(), layer.Bt.detach())]

    def _random(self, step: int, index: int) -> Tensor:
        """Ω of one layer, the same on every process and in a resumed run."""
        layer = self.layers[index]
        generator = torch.Generator().manual_seed(1_000_003 * step + index)
        return torch.randn(layer.shape[1], 2 * layer.rank, generator=generator, device="cpu")

    def _drawn(self, step: int) -> list[Tensor]:
        """Ω of every layer, in white coordinates where there are such."""
        bases: dict[int, Tensor] = {}
        for group in grouped(self.layers):
            Omega = torch.stack([self._random(step, i) for i in group.members]).to(group.A[0].device)
            if self.white:
                inputs = self.white.for_members(group.members).inputs
                Omega = inputs.whiten(Omega.to(inputs.U))
            bases.update(zip(group.members, Omega, strict=True))
        return [bases[i] for i in range(len(self.layers))]

    def _found(self, sketches: Sequence[Tensor]) -> list[Tensor]:
        """The basis of the second sketch of every layer, of what the first has found; zero where that overflowed.

        The sketches are zero then, and the layer keeps its adapters.
        """
        bases: dict[int, Tensor] = {}
        for group in grouped(self.layers):
            Y, usable = _finite([sketches[i] for i in group.members])
            if self.white:
                outputs = self.white.for_members(group.members).outputs
                Q = outputs.whiten(range_basis(outputs.whiten(Y)))
            else:
                Q = range_basis(Y)
            bases.update(zip(group.members, Q * usable, strict=True))
        return [bases[i] for i in range(len(self.layers))]

    def refresh(self, left: list[Tensor], right: list[Tensor]) -> None:
        """New adapters from Q (m×k) and Z = GᵀQ (n×k) of every layer; one without a usable sketch keeps its own."""
        groups = grouped(self.layers)
        found, usable = zip(*(self._part(group, left, right) for group in groups), strict=True)
        fit = iter(torch.cat([each.to(self.constants.device) for each in usable]).tolist())  # waits, once for all
        live = [[next(fit) for _ in part.layers] for part in found]
        parts = [part for part, own in zip(map(_only, found, live), live, strict=True) if any(own)]
        if not parts:
            return
        # The sketches know nothing of loss scaling and clipping: the loop's own global norm of the gradients stays.
        before, after = (
            torch.stack([_squares(part, gradients) for part, gradients in each]).sum()
            for each in ([(part, part.now) for part in parts], [(part, part.new) for part in parts])
        )
        share = (before / after).sqrt()
        with whole(self.layers):
            self.store.exchange(
                [whole_updates(part.layers, part.now.A, part.now.B) for part in parts],
                [whole_updates(part.layers, part.new.A, part.new.B) for part in parts],
            )
            for part in parts:
                self._replace(part, share.to(part.now.A.dtype))

    def _part(self, group: Group, left: list[Tensor], right: list[Tensor]) -> tuple[_Part, Tensor]:
        """The layers of one shape and what they become, and which of them took part in the last steps."""
        now = gather_group(group)
        (Q, _), (Z, _) = (_finite([basis[i] for i in group.members]) for basis in (left, right))
        rank, index = now.A.shape[-1], on_device(tuple(group.members), torch.long, self.constants.device)
        c = self.constants[index].to(Z.device)
        if self.white:
            new = white_adapters(Q, Z, *self.white.for_members(group.members), rank, c)
        else:
            new = optimal_adapters(sketched_svd(Q, Z), rank, c)
        usable = (Z.square().sum((1, 2)) > 0) & torch.isfinite(now.A.sum((1, 2)) + now.B.sum((1, 2)))
        trained = tuple(layer.A.requires_grad and layer.Bt.requires_grad for layer in group.layers)  # or frozen again
        usable &= on_device(trained, torch.bool, Z.device)
        s = on_device(tuple(layer.scale for layer in group.layers), torch.float32, Z.device)[:, None, None]
        new = new._replace(grad_A=s * new.grad_A, grad_B=s * new.grad_B)
        return _Part(group.layers, now, Directions(*(x.to(now.A.dtype) for x in new))), usable

    def _replace(self, part: _Part, share: Tensor) -> None:
        layers, _, new = part
        A, Bt, grad_A, grad_Bt = new.A.contiguous(), new.B.mT.contiguous(), new.grad_A, new.grad_B.mT
        copy_into([layer.A for layer in layers] + [layer.Bt for layer in layers], [*A, *Bt])
        gradients = [*(grad_A * share).contiguous(), *(grad_Bt * share).contiguous()]
        params = [layer.A for layer in layers] + [layer.Bt for layer in layers]
        there = [(p.grad, g) for p, g in zip(params, gradients, strict=True) if p.grad is not None]
        copy_into([grad for grad, _ in there], [g for _, g in there])
        for p in params:
            forget(self.optimizer, p)

    def state_dict(self) -> dict[str, Any]:
        return {
            "since": self.since,
            "steps": list(self.steps),
            "sketch": self.sketch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.since, self.steps = int(state["since"]), list(state["steps"])
        self.sketch.load_state_dict(state["sketch"])


def _squares(part: _Part, gradients: Gathered | Directions) -> Tensor:
    """The squared norm of those of matrices that have one in this step: to the others none is given."""
    squares = []
    for g, params in (
        (gradients.grad_A, [layer.A for layer in part.layers]),
        (gradients.grad_B, [layer.Bt for layer in part.layers]),
    ):
        there = on_device(tuple(p.grad is not None for p in params), torch.bool, g.device)[:, None, None]
        squares.append(torch.where(there, g.double(), 0.0).square().sum())
    return torch.stack(squares).sum()


def _finite(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacked, zeros in place of what is not finite through and through; and which are, (L, 1, 1)."""
    stack = torch.stack(list(tensors))
    usable = torch.isfinite(stack).flatten(1).all(1)[:, None, None]
    return torch.where(usable, stack, 0.0), usable


def _only(part: _Part, live: Sequence[bool]) -> _Part:
    """Some of its layers."""
    if all(live):
        return part
    kept = [i for i, fit in enumerate(live) if fit]
    return _Part(
        [part.layers[i] for i in kept], Gathered(*(x[kept] for x in part.now)), Directions(*(x[kept] for x in part.new))
    )
