"""LoRA-Pro: its steps are the projection of a dense one, whatever X is; against the published formulas in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_sylvester

from helpers import pairs
from scalora.algebra.lora_pro import least_steps, projected_gradient
from scalora.algebra.unmagnified import factor_basis
from scalora.methods.lora_pro import LoraProOptimizer

SEEDS = st.integers(0, 999)
SIZES = {"m": st.integers(4, 9), "n": st.integers(4, 9), "r": st.integers(1, 4), "s": st.sampled_from([0.5, 1.0, 2.0])}


def _published(A, B, grad_A, grad_B, s, X=None):
    """The published steps in PEFT's symbols, from the pair's gradients: of lora_A, of lora_B."""
    BB, AA = torch.linalg.inv(B.T @ B), torch.linalg.inv(A @ A.T)
    if X is None:
        X = torch.from_numpy(solve_sylvester(B.T @ B, A @ A.T, -BB @ grad_A @ A.T / s**2))
    complement = torch.eye(len(B)).double() - B @ BB @ B.T
    return BB @ grad_A / s**2 + X @ A, complement @ grad_B @ AA / s**2 - B @ X


def _projected(N, A, B):
    P_B, P_A = (X @ torch.linalg.pinv(X) for X in (B, A.T))
    return P_B @ N + N @ P_A - P_B @ N @ P_A


def _matrices(m, n, r, seed):
    _, layer = pairs.pair(m, n, r, seed)
    return layer.lora_A.detach(), layer.lora_B.detach(), pairs.gradients(m, n, 1, seed + 1)[0]


@given(seed=SEEDS, **SIZES)
def test_the_gradients_tell_the_projection_of_the_dense_one(m, n, r, s, seed):
    A, B, G = _matrices(m, n, r, seed)
    told = projected_gradient(factor_basis(B), factor_basis(A.T.clone()), s * G @ A.T, s * G.T @ B, s)
    torch.testing.assert_close(told, _projected(G, A, B), rtol=1e-5, atol=1e-6)


@given(seed=SEEDS, **SIZES)
def test_the_steps_move_w_by_the_projection_whatever_x_is(m, n, r, s, seed):
    A, B, N = _matrices(m, n, r, seed)
    D_B, D_A = least_steps(factor_basis(B), factor_basis(A.T.clone()), N, s)
    torch.testing.assert_close(s * (B @ D_A.T + D_B @ A), _projected(N, A, B), rtol=1e-5, atol=1e-6)
    X = pairs.gradients(r, r, 1, seed + 2)[0]
    other_A, other_B = _published(A, B, s * B.T @ N, s * N @ A.T, s, X)
    torch.testing.assert_close(s * (B @ other_A + other_B @ A), _projected(N, A, B), rtol=1e-5, atol=1e-6)
    assert D_A.square().sum() + D_B.square().sum() <= (other_A.square().sum() + other_B.square().sum()) * (1 + 1e-9)


@given(seed=SEEDS, **SIZES)
def test_they_are_the_published_ones_with_the_sylvester_equations_x(m, n, r, s, seed):
    A, B, N = _matrices(m, n, r, seed)
    D_B, D_A = least_steps(factor_basis(B), factor_basis(A.T.clone()), N, s)
    wanted_A, wanted_B = _published(A, B, s * B.T @ N, s * N @ A.T, s)
    torch.testing.assert_close(D_A.T, wanted_A, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(D_B, wanted_B, rtol=1e-4, atol=1e-6)


@settings(max_examples=20)
@given(m=st.integers(4, 8), n=st.integers(4, 8), r=st.integers(1, 3), s=st.sampled_from([1.0, 2.0]), seed=SEEDS)
def test_steps_of_the_optimizer_are_the_published_adams(m, n, r, s, seed):
    model, layer = pairs.pair(m, n, r, seed, s=s)
    optimizer = LoraProOptimizer(model, pairs.arguments(learning_rate=0.01))
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    dense = torch.nn.Parameter(torch.zeros(m, n).double())
    adam = torch.optim.Adam([dense], lr=1.0)  # its step of a zero parameter is −N
    for G in pairs.gradients(m, n, 4, seed + 1):
        equal_A, equal_B = _published(A, B, s * B.T @ G, s * G @ A.T, s, torch.zeros(r, r).double())
        dense.grad = s * (B @ equal_A + equal_B @ A)
        dense.data.zero_()
        adam.step()
        step_A, step_B = _published(A, B, s * B.T @ -dense.data, s * -dense.data @ A.T, s)
        A, B = A - 0.01 * step_A, B - 0.01 * step_B
        pairs.descend(optimizer, layer, [G])
        torch.testing.assert_close(layer.lora_A.detach(), A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.lora_B.detach(), B, rtol=1e-4, atol=1e-6)


@given(seed=SEEDS)
def test_at_full_rank_a_small_step_of_w_is_adams(seed):
    model, layer = pairs.pair(5, 8, 5, seed)
    optimizer = LoraProOptimizer(model, pairs.arguments(learning_rate=1e-6))
    start = pairs.update(layer)
    dense = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([dense], lr=1e-6)
    for G in pairs.gradients(5, 8, 4, seed + 1):
        dense.grad = G.clone()
        adam.step()
        pairs.descend(optimizer, layer, [G])
    torch.testing.assert_close((pairs.update(layer) - start) * 1e6, (dense - start) * 1e6, rtol=0, atol=0.02)


def test_b_at_zero_needs_no_case_of_its_own():
    model, layer = pairs.pair(6, 5, 2)
    with torch.no_grad():
        layer.lora_B.zero_()
    A = layer.lora_A.detach().clone()
    optimizer = LoraProOptimizer(model, pairs.arguments(learning_rate=1e-3))
    (update,) = pairs.descend(optimizer, layer, pairs.gradients(6, 5, 1))
    assert torch.equal(layer.lora_A, A)
    P_A = torch.linalg.pinv(A) @ A
    torch.testing.assert_close(update, -1e-3 * (pairs.gradients(6, 5, 1)[0] @ P_A).sign() @ P_A, rtol=1e-4, atol=1e-7)


def test_the_state_is_dense():
    model, layer = pairs.pair(6, 5, 2)
    optimizer = LoraProOptimizer(model, pairs.arguments())
    pairs.descend(optimizer, layer, pairs.gradients(6, 5, 1))
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(v.numel() for v in held) == 2 * 6 * 5
