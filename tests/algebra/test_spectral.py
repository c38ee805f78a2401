"""Spectral directions of two factors: against Muon's step of the dense gradient, projected by orthonormal bases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra.spectral import inverse_root, msign, spectral_directions

SIZES = st.tuples(st.integers(4, 12), st.integers(4, 12), st.integers(1, 4))
SEEDS = st.integers(0, 999)


def factors(sizes, seed, dtype=torch.float64):
    m, n, r = sizes
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((m, r), (n, r), (m, n))]


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def first_order(A, B, directions):
    return directions.A @ B.mT + A @ directions.B.mT


@given(sizes=SIZES, seed=SEEDS)
def test_the_product_moves_as_the_projected_dense_gradient_says(sizes, seed):
    A, B, G = factors(sizes, seed)
    Q_A, Q_B = torch.linalg.qr(A)[0], torch.linalg.qr(B)[0]
    dense = polar(G @ Q_B) @ Q_B.mT + Q_A @ polar(Q_A.mT @ G)
    found = spectral_directions(A, B, G @ B, G.mT @ A, damping=0.0)
    torch.testing.assert_close(first_order(A, B, found), dense, rtol=0, atol=1e-6)
    for part in (found.A @ B.mT, A @ found.B.mT):
        assert float(torch.linalg.matrix_norm(part, 2)) == pytest.approx(1, abs=1e-6)


@given(sizes=SIZES, seed=SEEDS, factor=st.sampled_from([1e-4, 0.3, 1e3]), size=st.sampled_from([1e-9, 1e6]))
def test_neither_the_balance_of_the_factors_nor_the_size_of_the_gradient_matters(sizes, seed, factor, size):
    A, B, G = factors(sizes, seed)
    one = first_order(A, B, spectral_directions(A, B, G @ B, G.mT @ A))
    scaled = A * factor, B / factor
    other = first_order(*scaled, spectral_directions(*scaled, size * G @ scaled[1], size * G.mT @ scaled[0]))
    torch.testing.assert_close(other, one, rtol=0, atol=1e-6)


@given(sizes=SIZES, seed=SEEDS)
def test_at_the_start_of_lora_only_the_zero_factor_moves(sizes, seed):
    A, B, G = factors(sizes, seed)
    found = spectral_directions(0 * A, B, G @ B, 0 * B, damping=0.0)
    assert not found.B.any()
    Q_B = torch.linalg.qr(B)[0]
    torch.testing.assert_close(found.A @ B.mT, polar(G @ Q_B) @ Q_B.mT, rtol=0, atol=1e-6)
    assert not any(part.any() for part in spectral_directions(0 * A, 0 * B, 0 * A, 0 * B))


@given(sizes=SIZES, seed=SEEDS, rank=st.integers(1, 4))
def test_msign_leaves_out_what_is_not_there(sizes, seed, rank):
    X, Y, _ = factors(sizes, seed, torch.float32)
    low = X[:, :rank] @ Y[: X.shape[1], :rank].mT
    sigma = torch.linalg.svdvals(msign(low).double())
    count = int(torch.linalg.matrix_rank(low, rtol=1e-4))
    assert sigma[:count].min() == pytest.approx(1, abs=1e-2)
    assert torch.equal(sigma > 1e-2, torch.arange(len(sigma)) < count)


def test_layers_of_a_stack_do_not_touch_each_other():
    A, B, G = factors((6, 5, 2), 0)
    ruined = A.clone()
    ruined[0, 0] = math.nan
    stacked = [torch.stack([one, two]) for one, two in ((A, ruined), (B, B), (G @ B, G @ B), (G.mT @ A, G.mT @ A))]
    found, alone = spectral_directions(*stacked), spectral_directions(A, B, G @ B, G.mT @ A)
    for both, one in zip(found, alone, strict=True):
        torch.testing.assert_close(both[0], one)
    assert found.B[1].isnan().all()
    assert inverse_root(torch.tensor([[math.inf]])).isnan().all()
