"""What may not change under a run: looked at before every optimizer step, by object identity; no tensor is read."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from ..common.errors import ScaloraError
from ..layers.peft_lora import AdapterLayer
from .config import ScaLoraConfig
from .optimizer_rules import state_rule
from .white.steps import refuse_left


class Guards:
    """Notices adapters that were deleted, switched off, merged, replaced or cast since ScaLoRA was attached."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, layers: list[AdapterLayer], config: ScaLoraConfig
    ) -> None:
        self.optimizer = optimizer
        self.one_factor = config.one_factor
        self.accumulate = config.accumulate
        self.plain = config.coordinates == "plain"
        places = {id(child): (parent, name) for parent in model.modules() for name, child in parent.named_children()}
        self.dtypes: dict[int, torch.dtype] = {}  # of each parameter, by its id
        self.layers = [(layer, places.get(id(layer.module))) for layer in layers]

    def check(self, *, starting: bool = False) -> None:
        """Look once; ``starting``: before the layers carry anything.

        Raises:
            ScaloraError: the next step would train something else than was attached; names layer and way out.
        """
        state_rule(self.optimizer, one_factor=self.one_factor)  # a weight decay may have come since
        if starting and self.plain:
            refuse_left(self.optimizer)
        accumulates = self.accumulate == "adapter" and not starting
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for layer, place in self.layers:
            if place is not None and place[0]._modules.get(place[1]) is not layer.module:
                raise ScaloraError(
                    f"layer {layer.name} is no longer part of the model (unload or merge_and_unload in mid-run?): "
                    "detach() ScaLoRA first, and attach it anew to a new PEFT model"
                )
            if problem := self._problem(layer, optimized, accumulates):
                raise ScaloraError(f"layer {layer.name}: {problem}")

    def _problem(self, layer: AdapterLayer, optimized: set[int], accumulates: bool) -> str:
        module, adapter = layer.module, layer.adapter
        held = module.r  # by adapter
        if adapter not in held:
            return f"adapter {adapter!r} was deleted in mid-run: detach() ScaLoRA before deleting adapters"
        if adapter not in module.active_adapters:
            return f"adapter {adapter!r} is not active: call model.set_adapter({adapter!r}) before the forward pass"
        if accumulates and adapter not in module.accumulated:  # pyright: ignore[reportAttributeAccessIssue]
            return f"adapter {adapter!r} was made anew in mid-run: detach() ScaLoRA first, and attach it anew"
        if module.disable_adapters:
            return "adapters are disabled: take optimizer steps outside of model.disable_adapter()"
        if module.merged:
            return "adapters are merged into the base weight: call model.unmerge_adapter() before going on"
        if self.accumulate == "base" and (others := set(held) - set(module.active_adapters)):
            return (
                f"accumulate='base' would change adapter {', '.join(map(repr, sorted(others)))} too, which shares the "
                "base weight: delete it, or choose accumulate='adapter'"
            )
        for p in (layer.A, layer.Bt):
            if id(p) not in optimized:
                return (
                    f"adapter {adapter!r} is not in the optimizer: create the optimizer after the adapters, and after "
                    "fully_shard, which replaces them, with all trainable parameters; then attach"
                )
            if p.ndim < 2:
                return f"adapter {adapter!r} was flattened after attach(), as FSDP1 does: use FSDP2 or DDP"
            if self.dtypes.setdefault(id(p), p.dtype) is not p.dtype:
                if self.optimizer.state.get(p):  # of the former dtype: torch itself would fail on it
                    return f"adapter {adapter!r} was cast to {p.dtype} in mid-run: cast the model before the first step"
                self.dtypes[id(p)] = p.dtype
        return ""
