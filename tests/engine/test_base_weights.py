"""The base store's sum is the same wherever in memory a weight lies, and however many rows it has."""

import pytest
import torch

from scalora.engine.stores import base_weights
from scalora.engine.stores.base_weights import _LINE, _add_product


@pytest.mark.parametrize("shape", [(7, 5), (64, 16), (3, 7, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aligned", [True, False])
def test_a_product_is_added_to_what_is_there(monkeypatch, shape, dtype, aligned):
    monkeypatch.setattr(base_weights, "_CACHED", 32)  # several rows at a time, and a rest
    *experts, m, n = shape
    room = torch.randn(torch.Size(shape).numel() + _LINE, dtype=dtype)
    first = next(i for i in range(_LINE) if (room[i:].data_ptr() % _LINE == 0) == aligned)
    weight = room[first : first + torch.Size(shape).numel()].view(shape)
    P, Q = torch.randn(*experts, m, 2, dtype=dtype), torch.randn(*experts, n, 2, dtype=dtype)
    expected = weight + P @ Q.mT
    beyond = room[:first].clone(), room[first + weight.numel() :].clone()
    _add_product(weight, P, Q.mT)
    torch.testing.assert_close(weight, expected)
    assert torch.equal(room[:first], beyond[0])
    assert torch.equal(room[first + weight.numel() :], beyond[1])
