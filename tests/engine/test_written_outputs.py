"""Whoever writes to a layer's output in place, as ReLU(inplace=True) does, may go on doing so."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scalora
from scalora import ScaLoraConfig

CONFIGS = {
    "rescaled": {"interval": 1},
    "refreshed": {"interval": None, "refresh": 2},
    "white": {"interval": None, "coordinates": "white"},
    "all": {"interval": 1, "refresh": 2, "coordinates": "white"},
}


class Network(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.see, self.hidden, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 12), nn.Linear(12, 4)
        self.first, self.second = nn.ReLU(inplace), nn.ReLU(inplace)

    def forward(self, x):
        return self.last(self.second(self.hidden(self.first(self.see(x)).mean((2, 3)))))


def _trained(inplace, config, lora):
    torch.manual_seed(3)
    options = LoraConfig(r=2, target_modules=["see", "hidden", "last"], **lora)
    model = get_peft_model(Network(inplace), options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scalora.attach(model, optimizer, ScaLoraConfig(**config))
    for step in range(6):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 1e-9}], ids=["fused", "PEFT's own forward"])
def test_training_is_the_same(config, lora):
    for (name, one), other in zip(
        _trained(True, config, lora).items(), _trained(False, config, lora).values(), strict=True
    ):
        assert torch.equal(one, other), name
