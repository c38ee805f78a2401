"""ScaLoRA under DeepSpeed's ZeRO-1 and 2: every process has all adapters, and a part of the optimizer's state.

DeepSpeed's optimizer averages gradients, clips them, lays this process's part of them beside its part of the float32
parameters, flat, and calls a torch optimizer on that. Just before this call an event belongs. There the gradients and
state of the adapters are gathered, the event is computed on all processes alike, and each writes its part back. Adding
up parts that do not overlap rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..common.errors import ScaloraError
from .config import ScaLoraConfig
from .event import ScaLora

_ATTACHED: WeakKeyDictionary[Any, ZeroSteps] = WeakKeyDictionary()


def zero_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's optimizer of ZeRO-1 or 2 that this is, or wraps; None for any other."""
    while optimizer is not None:
        if type(optimizer).__name__ == "DeepSpeedZeroOptimizer":
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def attach_zero(model: nn.Module, zero: Any, config: ScaLoraConfig) -> ScaLora:
    """Attach ScaLoRA to the model inside an engine, and to the engine's optimizer.

    Raises:
        ScaloraError: as :func:`scalora.attach`; or the optimizer keeps adapters in another way than is handled here.
    """
    if (former := _ATTACHED.get(zero)) is not None and former.handle.attached:
        raise ScaloraError("this optimizer already has a ScaLora attached: call its detach() first")
    if config.refresh is not None or config.coordinates == "white":
        raise ScaloraError(
            "DeepSpeed keeps one step counter for all of its part, so that no layer's state can start anew: leave "
            "refresh and white coordinates out, or use DDP or FSDP2"
        )
    inner: Any = zero.optimizer
    if type(inner).__module__.partition(".")[0] != "torch":
        raise ScaloraError(
            f"optimizer is {type(inner).__name__} inside DeepSpeed: give deepspeed.initialize a torch.optim.AdamW (in "
            "a Trainer: no optimizer section in DeepSpeed's configuration, which zero_allow_untested_optimizer)"
        )
    if zero.cpu_offload:
        raise ScaloraError("DeepSpeed offloads the optimizer's state, which events do not reach: leave offloading out")
    steps = ZeroSteps(getattr(model, "module", model) if _is_engine(model) else model, zero, config)
    _ATTACHED[zero] = steps
    return steps.handle


class _Part(NamedTuple):
    """What of a parameter lies on this process: entries of it, flat, and where they are in the flat partition."""

    start: int
    there: int
    size: int


class ZeroSteps:
    """Hands the handle, before each step of DeepSpeed's inner optimizer, whole gradients and state of the adapters."""

    def __init__(self, model: nn.Module, zero: Any, config: ScaLoraConfig) -> None:
        self.zero, self.inner = zero, zero.optimizer
        groups = [{**_options(own), "params": list(params)} for own, params in self._groups()]
        self.whole: Optimizer = type(self.inner)(groups)  # takes no steps: the handle looks at it in place of the other
        self.handle = ScaLora(model, self.whole, config)
        self.params = [p for layer in self.handle.layers for p in (layer.A, layer.Bt)]
        ids = {id(p) for p in self.params}
        found = [i for i, (_, params) in enumerate(self._groups()) if ids & {id(p) for p in params}]
        narrow = next((p.dtype for p in self.params if p.dtype != torch.float32), None)
        if len(found) > 1 or narrow:
            self.handle.detach()
            raise ScaloraError(
                f"DeepSpeed keeps the adapters in {narrow}: leave its bf16 and fp16 sections out, and autocast"
                if narrow
                else "DeepSpeed steps one parameter group after the other, but the adapters are in several: give all "
                "of them one learning rate and weight decay"
            )
        self.group = found[0]
        self.inner.register_step_pre_hook(self._before_step)
        self._step = zero.step
        zero.step = self._stepping

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
        return zip(self.inner.param_groups, self.zero.bit16_groups, strict=True)

    def _stepping(self, *args: Any, **kwargs: Any) -> Any:
        found = self._step(*args, **kwargs)
        if self.handle.attached:
            self.handle._watch()  # after DeepSpeed has gathered what is new
        return found

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """DeepSpeed lets the inner optimizer step one group at a time."""
        flat = self.zero.single_partition_of_fp32_groups[self.group]
        if optimizer.param_groups[0]["params"][0] is not flat or not (self.handle.attached or self.handle.superseded):
            return
        for own, group in zip(self.inner.param_groups, [self.whole.param_groups[self.group]], strict=False):
            group.update(_options(own))
        interval = self.handle.config.interval
        if interval is None or self.handle.step % interval:
            self.handle._before_step(self.whole, (), {})
            return
        state = self.inner.state[flat]
        flats = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape}
        others = {key: value for key, value in state.items() if key not in flats}
        gradients, *states = (self._gathered(each) for each in (flat.grad, *flats.values()))
        for i, p in enumerate(self.params):
            p.grad = gradients[i]
            if state:
                self.whole.state[p] = others | {key: each[i] for key, each in zip(flats, states, strict=True)}
        try:
            self.handle._before_step(self.whole, (), {})
            self._scatter(flat.data, [p.data for p in self.params])
            for target, values in zip((flat.grad, *flats.values()), (gradients, *states), strict=True):
                self._scatter(target, values)
        finally:
            for p in self.params:
                p.grad = None
            self.whole.state.clear()

    def _gathered(self, flat: Tensor) -> list[Tensor]:
        """Of a flat partition what belongs to each adapter matrix, whole. A collective."""
        whole = torch.zeros(sum(p.numel() for p in self.params), dtype=flat.dtype, device=flat.device)
        split = whole.split([p.numel() for p in self.params])
        for p, values in zip(self.params, split, strict=True):
            if part := _part(p):
                values[part.start : part.start + part.size] = flat[part.there : part.there + part.size]
        dist.all_reduce(whole, group=self.zero.real_dp_process_group[self.group])
        return [values.view_as(p) for p, values in zip(self.params, split, strict=True)]

    def _scatter(self, flat: Tensor, values: list[Tensor]) -> None:
        for p, value in zip(self.params, values, strict=True):
            if part := _part(p):
                flat[part.there : part.there + part.size] = value.flatten()[part.start : part.start + part.size]


def _part(p: Any) -> _Part | None:
    mapping = p._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _Part(here.start, there.start, here.numel)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _is_engine(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] == "deepspeed"
