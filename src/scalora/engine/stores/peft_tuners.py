"""What PEFT's tuners must know of layers that carry accumulated columns, or of a base that was written to.

Everything layer by layer is done by :class:`scalora.layers.stand_in.StandIn`. What remains are calls that read the two
trained matrices past the layer, and calls that take the base for the original one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ...common.errors import ScaloraError
from ...layers.accumulated import Accumulated
from ...layers.joined_config import JoinedConfig, link_config
from ...layers.layout import as_columns, as_rows, experts, grown, lora_a, lora_b
from ...layers.peft_lora import AdapterLayer, tied_weights
from ...layers.stand_in import StandIn


class Relinked(nn.Module):
    """Whatever holds PEFT's configurations; those of a copy speak of the copy."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, config in list(self.peft_config.items()):  # pyright: ignore
            if isinstance(config, JoinedConfig):
                link_config(self.peft_config, name, wrapped(self))  # pyright: ignore


class KnowsItsBase(Relinked, BaseTuner):
    """A tuner of PEFT's that does not take the base for the original one where accumulate='base' has written to it."""

    def disable_adapter_layers(self) -> None:
        refuse_written(self, "disable_adapter()")
        super().disable_adapter_layers()

    def unload(self) -> nn.Module:
        refuse_written(self, "unload()")
        return super().unload()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        _refuse_shared(self)
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> nn.Module:
        _refuse_shared(self)
        if adapter_names is not None and not adapter_names:
            refuse_written(self, "merge_and_unload(adapter_names=[])")
        return super().merge_and_unload(*args, adapter_names=adapter_names, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        refuse_written(self, "delete_adapter()")
        super().delete_adapter(adapter_name)


class OneAdapter(KnowsItsBase, LoraModel):
    """PEFT's LoraModel with layers that stand in for its own."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. An adapter made with a trained one's own configuration is its copy, and gets as many columns."""
        source = self.peft_config[adapter_name]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if isinstance(source, JoinedConfig):
            link_config(self.peft_config, adapter_name, self.model)
            for layer in stand_ins(self):
                if source._adapter in layer.accumulated and adapter_name in layer.r:
                    held = layer.accumulated[source._adapter]
                    layer.accumulated[adapter_name] = twin = room_for(layer, adapter_name, held.room)  # pyright: ignore
                    twin.used = held.used  # pyright: ignore

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's, of all columns of each adapter.

        Raises:
            ScaloraError: they are more than a layer has singular values, which PEFT would take.
        """
        with all_columns_as_one(self, adapters):
            super().add_weighted_adapter(adapters, *args, **kwargs)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, which leaves hooks behind where a layer refuses: so it is asked before there are any."""
        if names := kwargs.get("adapter_names"):
            for layer in stand_ins(self):
                layer.refuse_part(names)
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def _check_add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> tuple[str, int, Any]:
        combination, rank, targets = super()._check_add_weighted_adapter(adapters, *args, **kwargs)
        if combination.endswith("svd"):
            _refuse_narrow_layers(self, adapters, rank)
        return combination, rank, targets


def wrapped(owner: nn.Module) -> nn.Module:
    """The model to which the names in PEFT's configurations refer."""
    return owner.model if isinstance(owner, BaseTuner) else owner  # pyright: ignore


def room_for(layer: LoraLayer, adapter: str, room: int) -> Accumulated:
    """No accumulated columns yet, and room for so many."""
    A, count = lora_a(layer, adapter), experts(layer)
    rows, columns = as_columns(lora_b(layer, adapter), count).shape[0], as_rows(A, count).shape[1]
    return Accumulated(rows, columns, room, A)


def refuse_written(model: nn.Module, what: str) -> None:
    """Refuse what would take the base for the original one where accumulate='base' has written to it."""
    for layer in stand_ins(model):
        layer.refuse_written(what)


def _refuse_shared(model: nn.Module) -> None:
    """Refuse to merge into a weight that serves elsewhere too: PEFT would change that as well, silently."""
    layers = [AdapterLayer(layer.layer_name, layer, next(iter(layer.r))) for layer in stand_ins(model) if layer.r]
    if shared := tied_weights(model, layers):
        raise ScaloraError(
            f"layer {shared[0].name}: its weight serves elsewhere in the model too (a tied head, layer_replication), "
            "which merging would change as well: save the adapter, or give the layer a weight of its own first "
            "(layer.weight = nn.Parameter(layer.weight.clone()))"
        )


@contextmanager
def all_columns_as_one(tuner: LoraModel, adapters: Sequence[str]) -> Iterator[None]:
    """Within, each of these adapters is a plain LoRA of all its columns, its configuration included."""
    saved: list[Callable[[], None]] = []
    try:
        for adapter in adapters:
            if adapter in tuner.peft_config:
                saved += _put_in_all_columns(tuner, adapter)
        yield
    finally:
        for undo in reversed(saved):
            undo()


def _refuse_narrow_layers(tuner: LoraModel, adapters: Sequence[str], rank: int) -> None:
    held = [layer.accumulated[each] for layer in stand_ins(tuner) for each in adapters if each in layer.accumulated]
    least = min((min(h.P.shape[0], h.Qt.shape[1]) for h in held if h.used), default=rank)  # pyright: ignore
    if rank > least:
        raise ScaloraError(
            f"adapters of {rank} columns, the accumulated ones included, have more than the {least} singular values of "
            f"the narrowest layer: give svd_rank={least} or less"
        )


def _put_in_all_columns(tuner: LoraModel, adapter: str) -> Iterator[Callable[[], None]]:
    config: Any = tuner.peft_config[adapter]
    written = config.to_dict()
    for layer in stand_ins(tuner):
        held = layer.held(adapter) if adapter in layer.r and experts(layer) == 1 else None  # PEFT refuses experts
        if held is None:
            continue
        P, Qt = held.columns()
        bare = adapter in layer.lora_embedding_A
        places: Any = (layer.lora_embedding_A, layer.lora_embedding_B) if bare else (layer.lora_A, layer.lora_B)
        for dim, (place, more) in enumerate(zip(places, (Qt, P), strict=True)):
            yield (lambda place=place, module=place[adapter]: place.__setitem__(adapter, module))
            matrix = nn.Parameter(grown(layer.matrices(adapter)[dim].detach(), more, dim, 1), requires_grad=False)
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.weight = matrix
            place[adapter] = matrix if bare else linear
    if written["r"] != config.r or written["rank_pattern"] != config.rank_pattern:
        sizes = "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"
        whole = {name: written[name] for name in (*sizes, "init_lora_weights")}
        former_fields = {name: getattr(config, name) for name in whole}
        yield lambda: vars(config).update(former_fields)
        vars(config).update(whole)


def stand_ins(model: nn.Module) -> list[StandIn]:
    """The layers of a model that stand in for PEFT's."""
    return [module for module in model.modules() if isinstance(module, StandIn)]
