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
