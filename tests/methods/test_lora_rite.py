"""LoRA-RITE: against its Algorithm 1 by QR and dense roots, and the same for every split of one product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import pairs
from scalora import ScaloraError
from scalora.methods.lora_rite import LoraRiteOptimizer

SEEDS = st.integers(0, 999)


class Reference:
    """Algorithm 1 of 2410.20625 for one pair, by QR; what is lora_B here is A there."""

    def __init__(self, A, B, betas=(0.9, 0.999), escape=False):
        self.pair, self.betas, self.escape, self.step = [B.clone(), A.T.clone()], betas, escape, 0
        self.state = [None, None]

    def descend(self, grads, lr, clip):
        self.step += 1
        split = [torch.linalg.qr(self.pair[1]), torch.linalg.qr(self.pair[0])]
        unmagnified = [g @ R.inverse() for g, (_, R) in zip(grads, split, strict=True)]
        unmagnified = [U * (U.square().mean().sqrt() <= 1) for U in unmagnified]
        norm = torch.cat([U.flatten() for U in unmagnified]).norm()
        for i, (U, (Q, R)) in enumerate(zip(unmagnified, split, strict=True)):
            U = U * min(1.0, clip / (float(norm) + 1e-6))
            M, V, rho, old = self.state[i] or (torch.zeros_like(U), torch.zeros_like(R), 0.0, torch.zeros_like(Q))
            P = Q.T @ old
            moved = P @ V @ P.T
            b1, b2 = (b * (1 - b ** (self.step - 1)) / (1 - b**self.step) for b in self.betas)
            if self.escape:
                lost = (torch.linalg.eigvalsh(V) - torch.linalg.eigvalsh(moved)).max()
                rho = b2 * (rho + float(min(lost, V.trace() - moved.trace()).clamp(min=0)))
            V = b2 * moved + (1 - b2) * U.T @ U / len(U)
            e, W = torch.linalg.eigh(V)
            M = b1 * M @ P.T + (1 - b1) * U @ (W / ((e + rho).sqrt() + 1e-6)) @ W.T
            self.state[i] = (M, V, rho, Q)
            self.pair[i] = self.pair[i] - lr * M @ R.inverse().T


@settings(max_examples=25)
@given(
    m=st.integers(4, 9), n=st.integers(4, 9), r=st.integers(1, 3), seed=SEEDS, size=st.sampled_from([0.01, 0.3, 3.0]),
    escape=st.booleans(), clip=st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_a_step_is_algorithm_1(m, n, r, seed, size, escape, clip):
    model, layer = pairs.pair(m, n, r, seed)
    optimizer = LoraRiteOptimizer(model, pairs.arguments(learning_rate=0.01, max_grad_norm=clip), escape)
    reference = Reference(layer.lora_A.detach(), layer.lora_B.detach(), escape=escape)
    for G in size * pairs.gradients(m, n, 4, seed + 1):
        pairs.give(layer, G)
        reference.descend([layer.lora_B.grad, layer.lora_A.grad.T], 0.01, clip or torch.inf)
        optimizer.step()
        torch.testing.assert_close(layer.lora_B.detach(), reference.pair[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(layer.lora_A.detach().T, reference.pair[1], rtol=1e-6, atol=1e-7)


@settings(max_examples=25)
@given(m=st.integers(4, 9), n=st.integers(4, 9), r=st.integers(1, 4), seed=SEEDS, escape=st.booleans())
def test_the_update_of_w_does_not_depend_on_the_split(m, n, r, seed, escape):
    """A → R A, B → B R⁻¹; AdamW's does depend on it."""
    runs = []
    for optimizer_of in (
        lambda model: LoraRiteOptimizer(model, pairs.arguments(learning_rate=0.01, weight_decay=0.1), escape),
        lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01),
    ):
        for split in (torch.eye(r).double(), pairs.gradients(r, r, 1, seed + 2)[0] + 2 * torch.eye(r)):
            model, layer = pairs.pair(m, n, r, seed)
            with torch.no_grad():
                layer.lora_A.copy_(split @ layer.lora_A)
                layer.lora_B.copy_(layer.lora_B @ split.inverse())
            runs.append(pairs.descend(optimizer_of(model), layer, 0.1 * pairs.gradients(m, n, 5, seed + 1)))
    torch.testing.assert_close(torch.stack(runs[1]), torch.stack(runs[0]), rtol=1e-5, atol=1e-6)
    assert (runs[3][-1] - runs[2][-1]).abs().max() > 1e-4


def test_with_b_at_zero_a_stands_still_for_one_step_and_then_moves():
    model, layer = pairs.pair(6, 5, 2)
    with torch.no_grad():
        layer.lora_B.zero_()
    start = layer.lora_A.detach().clone()
    optimizer = LoraRiteOptimizer(model, pairs.arguments(learning_rate=0.01))
    pairs.descend(optimizer, layer, 0.1 * pairs.gradients(6, 5, 1))
    assert torch.equal(layer.lora_A, start)
    assert torch.linalg.matrix_rank(layer.lora_B) == 2
    pairs.descend(optimizer, layer, 0.1 * pairs.gradients(6, 5, 1, 1))
    assert not torch.equal(layer.lora_A, start)
    assert layer.lora_A.isfinite().all()


def test_a_gradient_that_leaps_is_left_out():
    model, layer = pairs.pair(6, 5, 2)
    optimizer = LoraRiteOptimizer(model, pairs.arguments(learning_rate=0.01))
    before = pairs.update(layer)
    pairs.descend(optimizer, layer, 100 * pairs.gradients(6, 5, 1))
    assert torch.equal(pairs.update(layer), before)


def test_trainers_own_clipping_is_off():
    model, _ = pairs.pair(6, 5, 2)
    arguments = pairs.arguments(max_grad_norm=0.5)
    assert LoraRiteOptimizer(model, arguments).max_norm == 0.5
    assert arguments.max_grad_norm == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_end_the_run_in_one_sentence(bad):
    model, layer = pairs.pair(6, 5, 2)
    optimizer = LoraRiteOptimizer(model, pairs.arguments())
    with pytest.raises(ScaloraError, match=r"no longer finite.*learning_rate"):
        pairs.descend(optimizer, layer, bad * torch.ones(1, 6, 5).double())
