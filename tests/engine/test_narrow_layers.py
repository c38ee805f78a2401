"""Adapters that hold more columns than a layer has singular values."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scalora
from scalora import ScaloraError


def test_a_weighted_adapter_wider_than_its_layer_is_refused_before_it_is_made():
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 10)), config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = scalora.attach(model, optimizer, {"interval": 1})
    x = torch.randn(5, 6)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    handle.detach()
    with pytest.raises(ScaloraError, match=r"12 columns.* 6 singular values.*svd_rank=6"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="svd")
    assert set(model.peft_config) == {"default", "other"}
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=6)
    layer = model.base_model.model[0]
    whole = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("sum"), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("capacity", [10**9, 40])
def test_no_more_columns_are_kept_than_can_matter(capacity):
    """Any capacity past the widest layer's singular values loses nothing, and is the same run."""
    runs = []
    for given in (capacity, 12):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
        model = get_peft_model(network, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        handle = scalora.attach(model, optimizer, {"interval": 1, "capacity": given})
        x = torch.randn(8, 12)
        for _ in range(30):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model(x))
        assert float(handle.store.total.min()) > 0  # it has been recompressed
        assert {layer.accumulated.room for layer in handle.layers} == {12 + 4 * 2}
        assert float(handle.store.discarded.max()) < 1e-9
    assert torch.equal(*runs)


def test_columns_that_come_after_a_recompression_are_not_taken_for_what_it_left():
    """A layer of a smaller rank has fewer columns than its capacity when a wider one asks for room."""
    network = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    config = LoraConfig(r=4, rank_pattern={"2": 1}, target_modules=["0", "2"])
    model = get_peft_model(network, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = scalora.attach(model, optimizer, {"interval": 1, "capacity": 8})
    narrow, recompress, lost = handle.layers[1].accumulated, handle.store.recompress, []

    def watched():
        P, Qt = (t.clone() for t in narrow.columns())
        recompress()
        least = torch.linalg.svdvals(P.double() @ Qt.double())[8:].norm()
        kept = narrow.columns()
        lost.append((float((kept[0].double() @ kept[1].double() - P.double() @ Qt.double()).norm()), float(least)))

    handle.store.recompress = watched
    x, y = torch.randn(32, 12), torch.randn(32, 12)
    for _ in range(40):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(lost) > 5
    assert max(least for _, least in lost) > 1e-5  # there is something to lose
    assert all(error < 1.01 * least + 1e-6 for error, least in lost), lost
