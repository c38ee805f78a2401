"""The study of rescaled HiRA: an event changes no output, and its factors are the theorem's for W∘G."""

import copy

import pytest
import torch
from benchmarks.studies import rescaled_hira
from peft import HiraConfig, get_peft_model
from torch import nn

from scalora.algebra.reference import reference_scaling
from scalora.layers.hira_forward import fuse_hira

M, N, R = 7, 5, 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(N, M)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture
def trained(monkeypatch):
    """A model with HiRA that has taken three steps, its optimizer, gradients of the next, and data."""
    model = get_peft_model(Model(), HiraConfig(r=R, target_modules=["layer"])).double()
    fuse_hira(model)
    events = rescaled_hira.Rescaled(model, "paper")
    events.stores = {place: store.double() for place, store in events.stores.items()}
    monkeypatch.setattr(rescaled_hira.hira_forward, "_adapted", events.adapted)
    monkeypatch.setattr(rescaled_hira, "EVERY", 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(20, N, dtype=torch.float64)
    target = torch.randn(20, M, dtype=torch.float64)
    for step in range(4):
        optimizer.zero_grad()
        (model(x) - target).square().sum().backward()
        if step < 3:
            optimizer.step()
    return model, events, optimizer, x, target


def test_an_event_moves_what_the_factors_lose_and_changes_no_output(trained):
    model, events, optimizer, x, _ = trained
    before, factors = model(x), copy.deepcopy(events.layers[0].hira_B["default"])
    for _ in range(2):
        events.on_pre_optimizer_step(optimizer=optimizer)
    assert not torch.allclose(events.layers[0].hira_B["default"], factors)
    torch.testing.assert_close(model(x), before)


def test_factors_are_those_of_the_weight_times_the_gradient(trained):
    model, events, optimizer, x, target = trained
    layer = events.layers[0]
    A, B = layer.hira_B["default"].detach().clone(), layer.hira_A["default"].detach().mT.clone()
    G = 2 * (model(x) - target).detach().mT @ x
    WG = rescaled_hira.weight_of(layer) * G
    events.on_pre_optimizer_step(optimizer=optimizer)
    expected = reference_scaling(WG, A, B, c=float(events.constants[0]))
    torch.testing.assert_close(layer.hira_B["default"].detach(), A * expected.alpha)
    torch.testing.assert_close(layer.hira_A["default"].detach().mT, B * expected.beta)
