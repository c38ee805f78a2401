"""Balance: against dense definitions in float64, and what it must leave alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from scalora.algebra.balancing import (
    FactorGrams,
    balancing_maps,
    refactoring,
    refactoring_scale,
    weighs_more,
)

SEEDS = st.integers(0, 999)
SIZES = {"m": st.integers(4, 20), "n": st.integers(4, 20), "r": st.integers(1, 4), "seed": SEEDS}


def factors(m, n, r, seed, layers=2):
    """A and B, stacked, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(layers, size, r, generator=generator, dtype=torch.float64) for size in (m, n))
    return A * 10.0 ** (seed % 5 - 3), B


def dense_refactoring(A, B):
    """S̃ of one layer as the paper writes it, by scipy's matrix square roots."""
    root = sqrtm((B.T @ B).numpy())
    inverse = torch.from_numpy(root).inverse().numpy()
    return torch.from_numpy(inverse @ sqrtm(root @ (A.T @ A).numpy() @ root) @ inverse)


@given(**SIZES)
def test_the_refactoring_is_the_papers(m, n, r, seed):
    A, B = factors(m, n, r, seed)
    S, inverse = refactoring(FactorGrams.of(A, B))
    for i in range(len(A)):
        expected = dense_refactoring(A[i], B[i])
        torch.testing.assert_close(S[i] / expected.norm(), expected / expected.norm(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(S @ inverse, torch.eye(r).double().expand_as(S), rtol=0, atol=1e-6)


@given(**SIZES)
def test_the_refactoring_balances(m, n, r, seed):
    """S̃^½ carries over to B, its inverse to A; then their Gram matrices are one."""
    A, B = factors(m, n, r, seed)
    S, inverse = refactoring(FactorGrams.of(A, B))
    for i in range(len(A)):
        half, inverse_half = (torch.from_numpy(sqrtm(X.numpy()).real) for X in (S[i], inverse[i]))
        new_A, new_B = A[i] @ inverse_half, B[i] @ half
        torch.testing.assert_close(new_A @ new_B.T, A[i] @ B[i].T, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(new_A.T @ new_A, new_B.T @ new_B, rtol=1e-5, atol=1e-6)


@given(**SIZES)
def test_the_scale_gives_both_one_norm(m, n, r, seed):
    A, B = factors(m, n, r, seed)
    P = refactoring_scale(FactorGrams.of(A, B))[:, None, None]
    torch.testing.assert_close(torch.linalg.matrix_norm(A / P), torch.linalg.matrix_norm(B * P))


@given(**SIZES)
def test_the_maps_keep_the_product_and_balance_it(m, n, r, seed):
    A, B = factors(m, n, r, seed)
    of_A, of_B = balancing_maps(FactorGrams.of(A, B))
    new_A, new_B = A @ of_A, B @ of_B
    torch.testing.assert_close(new_A @ new_B.mT, A @ B.mT, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(of_A.mT @ of_B, torch.eye(r).double().expand_as(of_A), rtol=0, atol=1e-9)
    sigma = torch.linalg.svdvals(A @ B.mT)[:, :r]
    for new in (new_A, new_B):
        torch.testing.assert_close(new.mT @ new, torch.diag_embed(sigma), rtol=1e-6, atol=1e-7)


@given(**SIZES)
def test_the_maps_are_the_dense_decomposition_up_to_signs(m, n, r, seed):
    A, B = factors(m, n, r, seed)
    of_A, of_B = balancing_maps(FactorGrams.of(A, B))
    U, sigma, Vt = torch.linalg.svd(A @ B.mT)
    root = sigma[:, None, :r].sqrt()
    for new, dense in ((A @ of_A, U[:, :, :r] * root), (B @ of_B, Vt.mT[:, :, :r] * root)):
        gaps = -sigma[:, : r + 1].diff(dim=-1) if sigma.shape[-1] > r else -sigma[:, :r].diff(dim=-1)
        if (gaps > 1e-3 * sigma[:, :1]).all():
            torch.testing.assert_close(new.abs(), dense.abs(), rtol=1e-5, atol=1e-6)


@given(m=st.integers(4, 9), r=st.integers(2, 4), seed=SEEDS)
def test_what_cannot_be_balanced_stays_as_it_is(m, r, seed):
    """Zero, not finite, or of too low a rank: LoRA at its start must go on learning."""
    A, B = factors(m, m, r, seed, layers=4)
    A[0] = 0
    A[1, 0, 0] = float("nan")
    A[2, :, 1] = A[2, :, 0]
    grams = FactorGrams.of(A, B)
    eye = torch.eye(r).double()
    for maps in (balancing_maps(grams), refactoring(grams)):
        for each in maps:
            assert torch.equal(each[:2], eye.expand(2, r, r))
            assert each.isfinite().all()
    assert torch.equal(balancing_maps(grams).of_A[2], eye)
    assert not torch.equal(balancing_maps(grams).of_A[3], eye)
    assert torch.equal(refactoring_scale(grams)[:2], torch.ones(2).double())


def test_a_direction_that_rounding_cannot_tell_is_not_raised():
    A, B = factors(8, 8, 3, 7)
    A[:, :, 2] = A[:, :, 1]
    S, inverse = refactoring(FactorGrams.of(A, B))
    assert (torch.linalg.cond(S) < 1e10).all()
    torch.testing.assert_close(S @ inverse, torch.eye(3).double().expand_as(S), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "more"), [(1.0, True), (0.99, False), (1.01, True)])
def test_weight_is_the_norm_over_the_long_side(size, more):
    A, B = torch.full((6, 2), 1 / 6**0.5), torch.full((3, 2), 0.5 / 6**0.5 * 2**0.5)
    assert weighs_more(B * size * (1 + 1e-6), A).item() is more
