"""What an event may not do, or a device would stall: read a tensor, or copy numbers from the host."""

import pytest
import torch

from helpers import models
from helpers.attached import attached, full
from helpers.operations import Operations
from scalora.engine.stores.adapter import SLOTS


def _event(handle, model, kind):
    model(**models.batch(kind)).loss.backward()
    with Operations() as seen:
        handle.rescale()
    return seen


READS = {"_local_scalar_dense", "nonzero", "equal", "item", "is_nonzero", "allclose"}
HOST = {"lift_fresh", "lift_fresh_copy", "lift"}  # torch.tensor(...) of Python numbers


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
@pytest.mark.parametrize("scaling", ["paper", "scalar", "normalize"])  # the non-negative solver leaves early on a CPU
def test_an_event_reads_nothing_and_sends_nothing(accumulate, scaling):
    model, optimizer, handle = attached(accumulate=accumulate, scaling=scaling)
    models.train(model, optimizer, "llama", 3)
    assert not full(handle.store)
    seen = _event(handle, model, "llama")
    assert "mul" in seen.names or "_foreach_mul_" in seen.names  # the watch does see
    assert not seen.names & (READS | HOST)


def test_the_watch_on_operations_sees_what_it_should():
    with Operations() as seen:
        torch.ones(2).sum().item()
        torch.tensor([1.0, 2.0]) + 1
    assert seen.names & READS
    assert seen.names & HOST


def test_in_the_adapter_store_nothing_of_size_m_by_n_is_made():
    model, optimizer, handle = attached(lora={"r": 1, "lora_alpha": 2}, capacity=2)
    models.train(model, optimizer, "llama", 3)
    layers = len(handle.layers)
    largest = max(a.shape[0] * b.shape[1] for a, b in ((layer.A, layer.Bt) for layer in handle.layers))
    for recompresses in (False, True):
        while full(handle.store) is not recompresses:
            models.train(model, optimizer, "llama", 1)
        assert _event(handle, model, "llama").largest < largest
    assert layers > 1


def test_only_columns_in_use_are_multiplied():
    model, optimizer, handle = attached()
    module = handle.layers[0].module
    room = handle.layers[0].accumulated.room

    def width():
        return [Bt.shape[0] for Bt, *_ in module._plain_adapters(torch.zeros(1, module.in_features))]

    r = handle.layers[0].rank
    assert width() == [r]  # nothing accumulated yet
    models.train(model, optimizer, "llama", 1)
    assert width() == [r, r]
    models.train(model, optimizer, "llama", room // r)
    assert width() == [r, room - (SLOTS - 1) * r]  # recompressed to its capacity, and one event


def _launches(layers, what, **config):
    """Of an event, one with a recompression, or a step in which sketches turn round or adapters are refreshed."""
    model, optimizer, handle = attached(layers=layers, **config)
    optimizer.param_groups[0]["foreach"] = True
    while (what == "turn" and handle.step < 2) or (what == "refresh" and handle.step < 4):
        models.train(model, optimizer, "llama", 1)
    while what in ("event", "recompression") and (handle.step < 3 or full(handle.store) is not (what != "event")):
        models.train(model, optimizer, "llama", 1)
    model(**models.batch("llama")).loss.backward()
    act = handle.rescale if what in ("event", "recompression") else optimizer.step
    with Operations() as seen:
        act()
    return seen


@pytest.mark.parametrize(
    ("what", "config", "most", "per_layer"),
    [
        ("event", {}, 420, 1),  # a window of P
        ("event", {"accumulate": "base"}, 420, 2),  # a weight, and s
        ("recompression", {}, 720, 1),
        ("turn", {"interval": None, "refresh": 4}, 200, 1),  # what is drawn for each layer, on the CPU
        ("refresh", {"interval": None, "refresh": 4}, 560, 8),  # two windows of P, what is drawn, the optimizer's state
    ],
)
def test_operations_do_not_grow_with_the_layers(what, config, most, per_layer):
    few, many = (_launches(layers, what, **config) for layers in (1, 5))
    more = 4 * len(models.TARGETS["llama"])
    assert many.launches - few.launches <= per_layer * more + 8  # long lists take some launches more
    assert few.launches <= most
    assert "linalg_qr" not in many.names
