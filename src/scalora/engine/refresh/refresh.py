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
from ..groups import Gathered, Group, gather_group, grouped
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
        ScaloraError: a layer has no 2r singular directions.
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
            self.sketch.open("left", [self._random(step, i) for i in range(len(self.layers))])
        elif step % self.every == self.every // 2 and self.sketch.side == "left":
            # Where a gradient overflowed the sketches are zero, and the layer keeps its adapters.
            self.sketch.open("right", [self._left(i, Y) for i, Y in enumerate(self.sketch.close())])
        if self.since < self.warmup:
            self._before = [
                local_shard(p).clone() for layer in self.layers for p in (layer.A.detach(), layer.Bt.detach())
            ]
        return refreshed

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._before:
            params = [local_shard(p) for layer in self.layers for p in (layer.A.detach(), layer.Bt.detach())]
            share = (self.since + 1) / (self.warmup + 1)
            torch._foreach_copy_(params, [torch.lerp(b, p, share) for b, p in zip(self._before, params, strict=True)])
            self._before = []

    def _random(self, step: int, index: int) -> Tensor:
        """Ω of one layer, the same on every process and in a resumed run."""
        layer = self.layers[index]
        generator = torch.Generator().manual_seed(1_000_003 * step + index)
        random = torch.randn(layer.shape[1], 2 * layer.rank, generator=generator, device="cpu").to(layer.A.device)
        if self.white is None:
            return random
        inputs = self.white.of(index).inputs
        return inputs.whiten(random.to(inputs.U))

    def _left(self, index: int, Y: Tensor) -> Tensor:
        """The basis of the second sketch of one layer, of what the first has found; zero where that overflowed."""
        usable = _is_finite(Y)
        if self.white is None:
            return range_basis(_finite(Y)) * usable
        outputs = self.white.of(index).outputs
        return outputs.whiten(range_basis(outputs.whiten(_finite(Y)))) * usable

    def refresh(self, left: list[Tensor], right: list[Tensor]) -> None:
        """New adapters from Q (m×k) and Z = GᵀQ (n×k) of every layer; one without a usable sketch keeps its own."""
        parts = [part for group in grouped(self.layers) if (part := self._part(group, left, right)).layers]
        if not parts:
            return
        # The sketches know nothing of loss scaling and clipping: the loop's own global norm of the gradients stays.
        before, after = (
            torch.stack([g.double().square().sum() for x in some for g in (x.grad_A, x.grad_B)]).sum()
            for some in ([part.now for part in parts], [part.new for part in parts])
        )
        share = (before / after).sqrt()
        with whole(self.layers):
            self.store.exchange(
                [whole_updates(part.layers, part.now.A, part.now.B) for part in parts],
                [whole_updates(part.layers, part.new.A, part.new.B) for part in parts],
            )
            for part in parts:
                self._replace(part, share.to(part.now.A.dtype))

    def _part(self, group: Group, left: list[Tensor], right: list[Tensor]) -> _Part:
        """The layers of one shape that took part in the last steps, and what they become."""
        now = gather_group(group)
        Q, Z = (torch.stack([_finite(basis[i]) for i in group.members]) for basis in (left, right))
        rank, c = now.A.shape[-1], self.constants[group.members].to(Z.device)
        if self.white:
            new = white_adapters(Q, Z, *self.white.for_members(group.members), rank, c)
        else:
            new = optimal_adapters(sketched_svd(Q, Z), rank, c)
        usable = (Z.square().sum((1, 2)) > 0) & torch.isfinite(now.A.sum((1, 2)) + now.B.sum((1, 2)))
        live = [i for i, fit in enumerate(usable.tolist()) if fit]
        layers = [group.layers[i] for i in live]
        s = torch.tensor([layer.scale for layer in layers], device=Z.device)[:, None, None]
        new = Directions(*(x[live].to(now.A.dtype) for x in new))
        return _Part(
            layers, Gathered(*(x[live] for x in now)), new._replace(grad_A=s * new.grad_A, grad_B=s * new.grad_B)
        )

    def _replace(self, part: _Part, share: Tensor) -> None:
        layers, _, new = part
        copy_into([layer.A for layer in layers], list(new.A))
        copy_into([layer.Bt for layer in layers], list(new.B.mT))
        for layer, grad_A, grad_B in zip(layers, new.grad_A, new.grad_B, strict=True):
            for p, gradient in ((layer.A, grad_A), (layer.Bt, grad_B.mT)):
                if p.grad is not None:
                    copy_into([p.grad], [gradient * share])
                self.optimizer.state.pop(p, None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "since": self.since,
            "steps": list(self.steps),
            "sketch": self.sketch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.since, self.steps = int(state["since"]), list(state["steps"])
        self.sketch.load_state_dict(state["sketch"])


def _is_finite(tensor: Tensor) -> Tensor:
    return torch.isfinite(tensor).all()


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(_is_finite(tensor), tensor, 0.0)
