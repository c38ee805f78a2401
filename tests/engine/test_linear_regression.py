"""The paper's Fig. 1 at 64×64×64, r = 8: rank grows past r, loss falls far below LoRA's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scalora
from scalora import ScaLoraConfig

N, R, STEPS = 64, 8, 300


def _problem():
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(N, N, generator=generator, dtype=torch.float64) for _ in range(2))
    return X, Y, float(torch.linalg.matrix_norm(X, 2) ** 2)


def _run(lr, config=None):
    """Final loss and the rank of the whole update after plain gradient descent."""
    X, Y, _ = _problem()
    torch.manual_seed(0)
    linear = nn.Linear(N, N, bias=False, dtype=torch.float64)
    nn.init.zeros_(linear.weight)
    model = get_peft_model(nn.Sequential(linear), LoraConfig(r=R, lora_alpha=R, target_modules=["0"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    handle = scalora.attach(model, optimizer, config) if config else None
    for _ in range(STEPS):
        loss = 0.5 * (model(X) - Y).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(loss):
            return float("inf"), R
    if handle is None:
        return float(loss.detach()), R
    layer = handle.layers[0]
    update = layer.scale * layer.A.double() @ layer.Bt.double() + layer.base_weight.double()
    return float(loss.detach()), int(torch.linalg.matrix_rank(update))


def _full(lr):
    X, Y, _ = _problem()
    W = torch.zeros(N, N, dtype=torch.float64)
    for _ in range(STEPS):
        W -= lr * X.T @ (X @ W - Y)
    return float(0.5 * (X @ W - Y).square().sum())


@pytest.mark.parametrize("scaling", ["paper", "nonnegative", "scalar"])
def test_scalora_goes_far_below_lora_and_reaches_full_rank(scaling):
    _, Y, L = _problem()
    start = float(0.5 * Y.square().sum())
    lora = min(_run(lr)[0] for lr in (3e-3, 1e-3, 3e-4))
    loss, rank = _run(0.01, ScaLoraConfig(interval=1, scaling=scaling, lipschitz=L, accumulate="base"))
    assert rank == N
    assert _full(1 / L) < loss < 200  # 2067 at the start; 122 for full gradient descent
    assert 1200 < lora < 0.7 * start  # the best of LoRA stalls near 1300


def test_scalora_lives_where_lora_diverges():
    L = _problem()[2]
    assert _run(0.01)[0] == float("inf")
    assert _run(0.01, ScaLoraConfig(interval=1, lipschitz=L, accumulate="base"))[0] < 200


def test_the_accumulated_adapter_gives_the_same_run_as_the_dense_merge():
    L = _problem()[2]
    dense, _ = _run(0.01, ScaLoraConfig(interval=1, lipschitz=L, accumulate="base"))
    adapter, _ = _run(0.01, ScaLoraConfig(interval=1, lipschitz=L, capacity=N))
    assert adapter == pytest.approx(dense, rel=0.02)
