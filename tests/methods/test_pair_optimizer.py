"""What optimizers of pairs share: pairs without gradients, heads of their own rate, autocast, one clipping of all."""

import pytest
import torch

from helpers import models, pairs, training
from scalora.methods.loft import LoftOptimizer
from scalora.methods.lora_muon import LoraMuonOptimizer
from scalora.methods.lora_pro import LoraProOptimizer
from scalora.methods.lora_rite import LoraRiteOptimizer
from scalora.runs.training import set_head_rate

KINDS = {
    "loft": LoftOptimizer,
    "lora-muon": LoraMuonOptimizer,
    "lora-pro": LoraProOptimizer,
    "lora-rite": LoraRiteOptimizer,
}


def _rest(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


def _give(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = 0.01 * torch.randn(p.shape, generator=generator)


def _made(name, tmp_path, **options):
    model = training.adapt(name, "bert", tmp_path / "base").model
    return model, KINDS[name](model, pairs.arguments(learning_rate=0.01, max_grad_norm=0, **options))


@pytest.mark.parametrize("name", KINDS)
def test_a_head_with_a_rate_of_its_own(name, tmp_path):
    model, optimizer = _made(name, tmp_path)
    set_head_rate(optimizer, model, ["classifier"], 0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for step in range(2):
        _give(model, step)
        optimizer.step()
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, before[n]) == ("lora_" not in n), n


@pytest.mark.parametrize("name", KINDS)
def test_pairs_without_gradients_stay(name, tmp_path):
    model, optimizer = _made(name, tmp_path)
    _give(model, 0)
    idle = next(p for n, p in model.named_parameters() if "lora_A" in n)
    idle.grad, before = None, idle.detach().clone()
    optimizer.step()
    assert torch.equal(idle, before)


@pytest.mark.parametrize("name", KINDS)
def test_under_bf16_autocast(name, tmp_path):
    adapted = training.adapt(name, "llama", tmp_path / "base")
    made = training.trainer(adapted, "llama", tmp_path / "out", bf16=True, learning_rate=5e-3)
    made.train()
    losses = training.losses(made)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in adapted.model.parameters() if p.requires_grad)
    assert models.logits(adapted.model, "llama").isfinite().all()


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.clips])
def test_all_gradients_are_clipped_together(name, tmp_path):
    """The rest moves by AdamW, which clipping does not change in size: so look at the gradients that are left."""
    model, optimizer = _made(name, tmp_path)
    optimizer.max_norm = 1e-3
    _give(model, 0)
    before = {n: p.grad.clone() for n, p in _rest(model).items()}
    optimizer.step()
    factors = {float((p.grad / before[n]).median()) for n, p in _rest(model).items()}
    assert max(factors) == pytest.approx(min(factors))
    assert 0 < max(factors) < 1e-3 / torch.cat([g.flatten() for g in before.values()]).norm()
