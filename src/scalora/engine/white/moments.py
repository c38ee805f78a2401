"""The whitening of every layer's inputs and of its outputs' gradients, looked at in some steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...algebra.directions import range_basis
from ...algebra.whitening import Root, Seen, Whitening, no_whitening, nystrom
from ...common.errors import ScaloraError
from ...layers.adopt import adopt
from ...layers.lora_forward import LoraForward
from ...layers.moment_sketch import MomentSketch
from ...layers.peft_lora import AdapterLayer
from ..groups import grouped
from ..leaves import Leaves, new_leaf

DIRECTIONS = 32  # eigenvectors that are followed, at most
FIRST = 3  # passes that are looked at one after the other at first
EVERY = 10  # and then so many steps apart
KEEP = 0.75  # of what was known, at most, when one more pass is looked at
_SAVED = "U", "e", "tail"


class White(NamedTuple):
    """The white coordinates of one layer, or stacked those of layers of one shape."""

    outputs: Whitening  # for A
    inputs: Whitening  # for B

    def at(self, i: int) -> White:
        """Those of one layer of several."""
        return White(*(side.at(i) for side in self))


class Moments:
    """White coordinates by group of layers; each look begins from the eigenvectors that those before have found."""

    def __init__(self, layers: Sequence[AdapterLayer], exponent: float) -> None:
        self.layers = list(layers)
        self.groups = grouped(self.layers)
        self.exponent = exponent
        self.white = [_start(layers, group.members, exponent) for group in self.groups]
        self.looks = 0
        self.looking = False
        self._roots: list[tuple[White, tuple[Root, Root]] | None] = [None] * len(self.groups)
        self._place = {i: (g, j) for g, group in enumerate(self.groups) for j, i in enumerate(group.members)}
        self._leaves = Leaves([])
        self._modules = [adopt(layer.module, LoraForward) for layer in layers]  # pyright: ignore[reportArgumentType]

    def of(self, index: int) -> White:
        """Those of one layer."""
        group, position = self._place[index]
        return self.white[group].at(position)

    def for_members(self, members: Sequence[int]) -> White:
        """Stacked, those of layers of one shape."""
        group, _ = self._place[members[0]]
        if list(members) == self.groups[group].members:
            return self.white[group]
        found = [self.of(i) for i in members]
        stacked = [zip(*(each.tensors for each in side), strict=True) for side in zip(*found, strict=True)]
        return White(*(Whitening(*map(torch.stack, side), exponent=self.exponent) for side in stacked))

    def inverse(self, group: int) -> tuple[Root, Root]:
        """N⁻¹ and M⁻¹ of a group, ready for products until the next look."""
        white = self.white[group]
        if (known := self._roots[group]) is None or known[0] is not white:
            known = white, (white.outputs.root(-1), white.inputs.root(-1))
            self._roots[group] = known
        return known[1]

    @torch.no_grad()
    def open(self) -> None:
        """Begin to look."""
        sketches: dict[int, MomentSketch] = {}
        for group, white in zip(self.groups, self.white, strict=True):
            Psi, Phi = white.outputs.U, white.inputs.U
            zero = Phi.new_zeros(())
            for i, phi, psi in zip(group.members, Phi, Psi, strict=True):
                sketches[i] = MomentSketch(phi, psi, *(new_leaf(zero, *shape) for shape in (phi.shape, psi.shape, ())))
        for i, module in enumerate(self._modules):
            module.moments = sketches[i]
        self._leaves = Leaves([leaf for i in range(len(sketches)) for leaf in sketches[i].leaves])
        self.looking = True

    @torch.no_grad()
    def close(self) -> bool:
        """What was seen since joins what was known, if there was a look; whether there was one. A collective.

        A layer without a gradient learns nothing.

        Raises:
            ScaloraError: the step's gradients came by a pass that is not looked at.
        """
        if not self.looking:
            return False
        self._leaves.refuse_unseen((layer.A for layer in self.layers), "coordinates='white'")
        self._leaves.gather()
        totals = self._leaves.totals()
        keep = min(self.looks / (self.looks + 1), KEEP)
        sides: list[Seen] = []
        for group, white in zip(self.groups, self.white, strict=True):
            of_inputs, of_outputs, trace = (
                torch.stack([totals[3 * i + part] for i in group.members]) for part in range(3)
            )
            sides += [Seen(white.outputs, of_outputs, trace), Seen(white.inputs, of_inputs, trace)]
        # Contiguous, as after a resume: in another layout some processors round products otherwise.
        found = [
            Whitening(*(x.contiguous() for x in side.tensors), exponent=self.exponent) for side in nystrom(sides, keep)
        ]
        self.white = [White(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
        self.looks += 1
        self.detach()
        return True

    def detach(self) -> None:
        """Look no more."""
        for module in self._modules:
            module.moments = None
        self._leaves, self.looking = Leaves([]), False

    def follow(self, former: Moments) -> None:
        """Begin where others have ended, of whose coordinates the optimizer's state is.

        Raises:
            ScaloraError: they are of other layers, or have another exponent.
        """
        names = [[layer.name for layer in group.layers] for group in self.groups]
        if former.exponent != self.exponent or names != [[layer.name for layer in g.layers] for g in former.groups]:
            raise ScaloraError(
                "this optimizer has made steps in other white coordinates (another exponent, or other layers), and its "
                "means of gradients are of these: go on with a new optimizer"
            )
        self.white, self.looks = list(former.white), former.looks

    def state_dict(self) -> dict[str, Any]:
        """To be asked for between a step and the next pass, when nothing has been seen yet."""
        named = ((layer.name, self.of(i)) for i, layer in enumerate(self.layers))
        return {
            "looks": self.looks,
            "looking": self.looking,
            "exponent": self.exponent,
            "white": {
                name: {side: {k: getattr(part, k).clone() for k in _SAVED} for side, part in white._asdict().items()}
                for name, white in named
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ScaloraError: the state is of other coordinates.
        """
        if (exponent := state.get("exponent", 0.5)) != self.exponent:
            raise ScaloraError(  # configurations that have an exponent were compared before
                f"the saved run's white coordinates have the exponent {exponent}, these {self.exponent}: finish it "
                "with the version of scalora that began it, or begin anew"
            )
        for g, group in enumerate(self.groups):
            saved = [state["white"][layer.name] for layer in group.layers]
            self.white[g] = White(
                *(
                    Whitening(*(torch.stack([x[side][k].to(part.U) for x in saved]) for k in _SAVED), exponent=exponent)
                    for side, part in self.white[g]._asdict().items()
                )
            )
        self.looks = int(state["looks"])
        self.detach()
        if state["looking"]:
            self.open()


def due(step: int) -> bool:
    """Whether the pass after this step is looked at."""
    return step + 1 < FIRST or (step > 0 and step % EVERY == 0)


def _start(layers: Sequence[AdapterLayer], members: Sequence[int], exponent: float) -> White:
    """No whitening, and random bases: the same on every process and in a resumed run."""
    sides = []
    for side in (0, 1):
        bases = []
        for i in members:
            size = layers[i].shape[side]
            generator = torch.Generator().manual_seed(7_368_787 + 2 * i + side)
            bases.append(range_basis(torch.randn(size, min(size, DIRECTIONS), generator=generator, device="cpu")))
        like: Tensor = layers[members[0]].A
        wide = torch.promote_types(like.dtype, torch.float32)
        sides.append(no_whitening(torch.stack(bases).to(like.device, wide).contiguous(), exponent))
    return White(*sides)
