"""What an event may not do, or a device would stall: read a tensor, or copy numbers from the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import models
from helpers.attached import accumulated, attached, full
from scalora.engine.stores.adapter import SLOTS


class Operations(TorchDispatchMode):
    """Names of the operations called inside, and the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


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


def test_only_columns_in_use_are_multiplied_unless_someone_else_wrote_to_them():
    model, optimizer, handle = attached()
    module = handle.layers[0].module
    full = handle.layers[0].frozen().rank

    def width():
        return [Bt.shape[0] for Bt, *_ in module._plain_adapters(torch.zeros(1, module.in_features))]

    r = handle.layers[0].rank
    assert width() == [r]  # nothing accumulated yet
    models.train(model, optimizer, "llama", 1)
    assert width() == [r, r]
    logits = models.logits(model, "llama")
    models.train(model, optimizer, "llama", full // r)
    assert width() == [r, full - (SLOTS - 1) * r]  # recompressed to its capacity, and one event
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models.train(model, optimizer, "llama", SLOTS)
    before = width()
    state = {name: torch.randn_like(tensor) if ".accumulated." in name else tensor for name, tensor in state.items()}
    model.load_state_dict(state)
    assert before != width() == [r, full]
    expected = accumulated(handle.layers[0]).float() @ torch.ones(module.in_features)
    layer = handle.layers[0]
    with torch.no_grad():
        value = module(torch.ones(1, module.in_features))[0] - layer.base(torch.ones(1, module.in_features))[0]
        value -= layer.scale * layer.A @ layer.Bt @ torch.ones(module.in_features)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, models.logits(model, "llama"))
