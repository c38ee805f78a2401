"""Notices kernels that bypass a layer: its adapter got a gradient, its own forward pass was not called.

Unsloth's and axolotl's fused LoRA kernels read the matrices of the first active adapter and compute by themselves. They
would leave out what is moved, so that every event would change the function.

Others (Mamba's, torch's attention) read the base weight past the layer. Its adapter then gets no gradient, so that
nothing is moved out of it and the function stays; but it does not train, which is said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ..common.errors import ScaloraError
from ..layers.peft_lora import AdapterLayer
from ..layers.sharding import is_sharded
from ..layers.stand_in import StandIn

PATIENCE = 10  # steps in which a layer may be left out before that is said


class OwnPasses:
    """Watches layers from now on until :meth:`stop`; costs a call per matrix and backward pass."""

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        self.graded: set[int] = set()  # layers whose adapter got a gradient since the last look
        self.earlier: set[int] = set()  # layers that were called before it: a loop may look one batch ahead
        self.layers = list(layers)
        self.silent = set(range(len(self.layers)))  # layers that have had neither pass nor gradient so far
        self.steps = 0
        self.hooks = []
        for i, layer in enumerate(layers):
            _stand_in(layer).called = False
            for p in (layer.A, layer.Bt):
                if p.requires_grad and not is_sharded(p):  # FSDP2 sets gradients past autograd's hooks
                    self.hooks.append(p.register_post_accumulate_grad_hook(partial(_note, self.graded, i)))

    def check(self) -> None:
        """Look once, before an optimizer step.

        Raises:
            ScaloraError: a layer was bypassed.
        """
        called = {i for i, layer in enumerate(self.layers) if _stand_in(layer).called}
        for i in sorted(self.graded - called - self.earlier):
            raise ScaloraError(
                f"layer {self.layers[i].name}: its adapter got a gradient without its own forward pass: a fused kernel "
                "(Unsloth's, axolotl's lora_*_kernel) reads the matrices past it, and would leave out what is moved; "
                "switch these kernels off"
            )
        for i in called:
            _stand_in(self.layers[i]).called = False
        self.silent -= called | self.graded
        self.graded.clear()
        self.earlier = called
        self.steps += 1
        if self.steps == PATIENCE and self.silent:
            names = ", ".join(self.layers[i].name for i in sorted(self.silent))
            warnings.warn(
                f"layers without a forward pass in {PATIENCE} steps, whose adapters do not train: {names}; either the "
                "model does not use them, or a kernel reads their weights past them",
                stacklevel=2,
            )

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _note(graded: set[int], index: int, parameter: Tensor) -> None:
    graded.add(index)


def _stand_in(layer: AdapterLayer) -> StandIn:
    assert isinstance(layer.module, StandIn)
    return layer.module
