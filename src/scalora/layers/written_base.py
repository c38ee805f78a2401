"""A LoRA layer whose base weight accumulate='base' may have written to: nobody shall take a part for the whole then.

A part of the update lies in the base weight. So the adapter alone is not the update, the weight alone is not the
original one, and both belong together at the scale at which the differences were moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ..common.errors import ScaloraError
from .lora_forward import LoraForward

_MERGING = ContextVar("_MERGING", default=False)  # while PEFT adds adapters to base weights, or takes them out again
_WHOLE = ContextVar("_WHOLE", default=False)  # while an adapter is loaded from its own folder
_WRITTEN = (
    "its base weights hold what accumulate='base' has moved there, so that {} would not give the untouched base: "
    "load the base model anew, or choose accumulate='adapter'"
)


class WrittenBase(LoraForward):
    """Refuses what would take the base for the original one, or the adapter for the whole update."""

    layer_name = ""  # in the model, for messages
    written: dict[str, float] | None = None  # the adapters' scales when accumulate='base' first wrote; None: it has not

    @property
    def base_written(self) -> bool:
        """Whether accumulate='base' has written to the base weight."""
        return self.written is not None

    def mark_written(self) -> None:
        """From now on the base weight is no reference any more."""
        if self.written is None:
            self.written = dict(self.scaling)

    def refuse_written(self, what: str) -> None:
        """Refuse what would take the base for the original one where it is not."""
        if self.base_written:
            raise ScaloraError(f"layer {self.layer_name}: " + _WRITTEN.format(what))

    def refuse_part(self, adapter_names: Any = None) -> None:
        """Refuse to compute with another scale than that of what was moved, or without the adapter."""
        if self.written is None:
            return
        if "__base__" in (adapter_names or ()):
            self.refuse_written("'__base__' in adapter_names")
        for adapter, scale in self.written.items():
            if not math.isclose(self.scaling.get(adapter, scale), scale):
                raise ScaloraError(
                    f"layer {self.layer_name}: adapter {adapter!r} has scale {self.scaling[adapter]}, but what "
                    f"accumulate='base' has moved into the base weights stays at {scale}: set it back, and mix the "
                    "weights of merge_and_unload() with the original ones instead, or choose accumulate='adapter'"
                )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.refuse_part(kwargs.get("adapter_names"))
        return super().forward(x, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As PEFT's, for merging; by hand it would be a part of the update only."""
        self.refuse_part()
        if self.base_written and not _MERGING.get():
            raise ScaloraError(
                f"layer {self.layer_name}: get_delta_weight({adapter!r}) would give a part of the update only, since "
                "the base weights hold what accumulate='base' has moved there: subtract the original base's weights "
                "from those of merge_and_unload(), or choose accumulate='adapter'"
            )
        return super().get_delta_weight(adapter)  # pyright: ignore[reportAttributeAccessIssue]

    def _activate_lora(self, active_adapters: list[str]) -> Any:
        """As PEFT's, in which a bare parameter is the sum of weight and adapters for one pass."""
        own = super()._activate_lora(active_adapters)  # pyright: ignore[reportAttributeAccessIssue]
        return _merging_in(own) if self.base_written else own

    def merge(self, *args: Any, **kwargs: Any) -> None:
        with _merging():
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        with _merging():
            super().unmerge()

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if self.base_written:
            raise ScaloraError(
                f"layer {self.layer_name}: adapter {adapter_name!r} cannot be added: " + _WRITTEN.format("it")
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.refuse_written("switching the adapters off")
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        self.refuse_written("deleting its adapter")
        super().delete_adapter(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        if not adapter_names:
            self.refuse_written("set_adapter([])")
        super().set_adapter(adapter_names, *args, **kwargs)


@contextmanager
def _merging() -> Iterator[None]:
    token = _MERGING.set(True)
    try:
        yield
    finally:
        _MERGING.reset(token)


@contextmanager
def _merging_in(inner: AbstractContextManager[None]) -> Iterator[None]:
    with _merging(), inner:
        yield


@contextmanager
def whole_adapter() -> Iterator[None]:
    """Within, an adapter is loaded from its own folder: whatever belongs to it is there or comes."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def loads_whole() -> bool:
    """Whether that is so now."""
    return _WHOLE.get()
