"""torch.set_default_device: what the engine makes lies where the adapters lie, and is drawn where it says."""

import pytest
import torch

import scalora
from helpers import models


@pytest.mark.parametrize(
    "config",
    [
        {"interval": 2, "refresh": 4},
        {"interval": 2, "refresh": 4, "accumulate": "base"},
        {"interval": 2, "refresh": 4, "coordinates": "white"},
    ],
)
def test_another_default_device_changes_nothing(config):
    plain, elsewhere = (trained(config, device) for device in ("cpu", "meta"))
    assert all(torch.equal(a, b) for a, b in zip(plain, elsewhere, strict=True))


def trained(config, device):
    """A model's parameters after a few steps: past the first recompression and three refreshes."""
    torch.manual_seed(0)
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-3)
    with torch.device(device):
        scalora.attach(model, optimizer, scalora.ScaLoraConfig(**config))
    for step in range(14):
        model(**models.batch("llama", step)).loss.backward()
        with torch.device(device):
            optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]
