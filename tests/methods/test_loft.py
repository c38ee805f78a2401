"""LoFT: AdamW of W at full rank; below that its published definition, in float64; the scale s means nothing."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers import pairs
from scalora.algebra.loft import LoftMoments, adam_bound, loft_step
from scalora.methods.loft import LoftOptimizer

SEEDS = st.integers(0, 999)
LR, EPS = 1e-3, 1e-8


class Reference:
    """LoFT as published, in coordinates of the factors, with s = 1, nothing damped, and Cᵀ P C the right way round."""

    def __init__(self, A, B, betas=(0.9, 0.999)):
        self.factors, self.betas, self.step = [B.clone(), A.T.clone()], betas, 0
        self.moments = [None, None]
        self.old = [A.T.clone(), B.clone()]  # the partners of the step before

    def descend(self, G, clip=math.inf):
        self.step += 1
        mover = (self.step + 1) % 2
        grams = [torch.linalg.inv(Y.T @ Y) for Y in reversed(self.factors)]
        dense = [G, G.T]
        told = dense[mover] @ self.factors[1 - mover] @ grams[mover] @ self.factors[1 - mover].T
        size = min(1.0, clip / (float(told.norm()) + 1e-6))
        for i in (0, 1):
            X, Y, K = self.factors[i], self.factors[1 - i], grams[i]
            grad = size * dense[i] @ Y @ K
            M, P = self.moments[i] or (torch.zeros_like(X), X.new_zeros(len(X), X.shape[1], X.shape[1]))
            C = self.old[i].T @ Y @ K
            M = self.betas[0] * M @ C + (1 - self.betas[0]) * grad
            P = self.betas[1] * C.T @ P @ C + (1 - self.betas[1]) * grad[:, :, None] * grad[:, None, :]
            self.moments[i], self.old[i] = (M, P), Y.clone()
        X, Y, K, (M, P) = self.factors[mover], self.factors[1 - mover], grams[mover], self.moments[mover]
        v = torch.einsum("ja,iab,jb->ij", Y, P, Y).clamp(min=0) / (1 - self.betas[1] ** self.step)
        N = M @ Y.T / (1 - self.betas[0] ** self.step) / (v.sqrt() + EPS)
        self.factors[mover] = X - LR * N @ Y @ K


def _well(*matrices):
    assume(all(torch.linalg.cond(matrix) < 30 for matrix in matrices))


@settings(max_examples=25)
@given(n=st.integers(2, 6), s=st.sampled_from([1.0, 0.5, 4.0]), decay=st.sampled_from([0.0, 0.3]), seed=SEEDS)
def test_at_full_rank_it_is_adamw_of_w(n, s, decay, seed):
    model, layer = pairs.pair(n, n, n, seed, s=s)
    _well(layer.lora_A.detach(), layer.lora_B.detach())
    optimizer = LoftOptimizer(model, pairs.arguments(learning_rate=LR, weight_decay=decay, max_grad_norm=0))
    dense = torch.nn.Parameter(pairs.update(layer))
    adamw = torch.optim.AdamW([dense], lr=LR, weight_decay=decay, eps=EPS)
    for G in pairs.gradients(n, n, 8, seed + 1):
        dense.grad = G.clone()
        adamw.step()
        pairs.descend(optimizer, layer, [G])
        torch.testing.assert_close(pairs.update(layer), dense.detach(), rtol=1e-6, atol=1e-6)


@settings(max_examples=25)
@given(
    m=st.integers(4, 8), n=st.integers(4, 8), r=st.integers(1, 3), seed=SEEDS, clip=st.sampled_from([0.0, 0.1])
)  # fmt: skip
def test_below_it_is_the_published_definition(m, n, r, seed, clip):
    model, layer = pairs.pair(m, n, r, seed, s=1.0)
    _well(layer.lora_A.detach(), layer.lora_B.detach())
    optimizer = LoftOptimizer(model, pairs.arguments(learning_rate=LR, max_grad_norm=clip))
    reference = Reference(layer.lora_A.detach(), layer.lora_B.detach())
    for G in pairs.gradients(m, n, 6, seed + 1):
        reference.descend(G, clip or math.inf)
        pairs.descend(optimizer, layer, [G])
        torch.testing.assert_close(layer.lora_B.detach(), reference.factors[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.lora_A.detach().T, reference.factors[1], rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(s=st.sampled_from([0.25, 8.0]), seed=SEEDS)
def test_alpha_means_nothing_to_the_steps_of_w(s, seed):
    runs = []
    for scale in (1.0, s):
        model, layer = pairs.pair(6, 5, 2, seed, s=scale)
        with torch.no_grad():
            layer.lora_B.div_(scale)
        optimizer = LoftOptimizer(model, pairs.arguments(learning_rate=LR))
        runs.append(pairs.descend(optimizer, layer, pairs.gradients(6, 5, 6, seed + 1)))
    torch.testing.assert_close(torch.stack(runs[0]), torch.stack(runs[1]), rtol=1e-6, atol=1e-7)


def test_one_factor_moves_at_a_time_and_first_the_one_that_is_zero():
    model, layer = pairs.pair(6, 5, 2)
    with torch.no_grad():
        layer.lora_B.zero_()
    optimizer = LoftOptimizer(model, pairs.arguments(learning_rate=LR, weight_decay=0.1))
    for step, G in enumerate(pairs.gradients(6, 5, 4), 1):
        before = layer.lora_B.detach().clone(), layer.lora_A.detach().clone()
        pairs.descend(optimizer, layer, [G])
        assert torch.equal(layer.lora_B, before[0]) == (step % 2 == 0)
        assert torch.equal(layer.lora_A, before[1]) == (step % 2 == 1)


@given(
    beta1=st.floats(0, 0.99), beta2=st.sampled_from([0.5, 0.9, 0.999]), steps=st.integers(1, 30), seed=SEEDS
)  # fmt: skip
def test_adams_step_has_a_bound_that_is_reached(beta1, beta2, steps, seed):
    w1, w2 = (
        torch.tensor([(1 - b) * b ** (steps - 1 - k) / (1 - b**steps) for k in range(steps)], dtype=torch.float64)
        for b in (beta1, beta2)
    )
    bound = adam_bound(steps, (beta1, beta2))
    worst = w1 / w2
    for g in (worst, torch.randn(steps, generator=torch.Generator().manual_seed(seed)).double()):
        assert float((w1 @ g) / (w2 @ g**2).sqrt()) <= bound * (1 + 1e-9)
    assert float((w1 @ worst) / (w2 @ worst**2).sqrt()) == pytest.approx(bound)


def test_rounding_does_not_make_a_step_larger_than_it_can_be():
    """After one step N is the gradient's sign; in float32 what cancels in v would let some entries be thousands."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(300, 8, generator=generator)).Q
    U = 10 * torch.randn(400, 8, generator=generator)
    moments = LoftMoments(U, U[:, :, None] * U[:, None, :], Q)
    wanted = (U @ Q.T).sign() @ Q
    assert (loft_step(moments, 1e-8, adam_bound(1, (0.9, 0.999))) - wanted).abs().max() < 0.3
    assert (loft_step(moments, 1e-8, math.inf) - wanted).abs().max() > 3
