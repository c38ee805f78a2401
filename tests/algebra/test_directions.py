"""Theorem 1: against the dense twin, against what it minimises, and from sketches against the SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra import reference
from scalora.algebra.directions import dense_svd, optimal_adapters, range_basis, sketched_svd

SIZES = st.integers(4, 12)


def decaying(m, n, seed, power=1.0):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64))[0] for size in (m, n))
    sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -power
    return U * sigma @ V.mT


def sketched(G, k, seed=0):
    Omega = torch.randn(G.shape[-1], k, generator=torch.Generator().manual_seed(seed), dtype=G.dtype)
    Q = range_basis(G @ Omega)
    return sketched_svd(Q, G.mT @ Q)


def angle(one, other):
    """The sine of the largest principal angle between two subspaces of one dimension."""
    return torch.linalg.matrix_norm(other - one @ (one.mT @ other), ord=2).item()


@given(m=SIZES, n=SIZES, r=st.integers(1, 2), seed=st.integers(0, 999), c=st.floats(0.01, 100))
def test_equals_the_dense_twin(m, n, r, seed, c):
    G = decaying(m, n, seed)
    new, (A, B) = optimal_adapters(dense_svd(G), r, c), reference.reference_adapters(G, r, c)
    torch.testing.assert_close(new.A @ new.A.mT, A @ A.mT)  # signs are free
    torch.testing.assert_close(new.B @ new.B.mT, B @ B.mT)
    torch.testing.assert_close(new.grad_A, G @ new.B)
    torch.testing.assert_close(new.grad_B, G.mT @ new.A)


@given(m=SIZES, n=SIZES, r=st.integers(1, 2), seed=st.integers(0, 999))
def test_no_other_adapters_come_closer_to_full_fine_tuning(m, n, r, seed):
    G, c, one = decaying(m, n, seed), 0.7, torch.ones(r)
    new = optimal_adapters(dense_svd(G), r, c)
    least = reference.objective(G, new.A, new.B, one, one, c)
    assert least == pytest.approx(float((c * torch.linalg.svdvals(G)[2 * r :]).square().sum()), abs=1e-12)
    generator = torch.Generator().manual_seed(seed)
    for other in range(20):
        size = 0.1 if other % 2 else 3.0  # near, and anywhere
        A, B = (x + size * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (new.A, new.B))
        assert reference.objective(G, A, B, one, one, c) >= least


@given(m=SIZES, n=SIZES, seed=st.integers(0, 999))
def test_a_sketch_as_wide_as_the_rank_is_exact(m, n, seed):
    G = decaying(m, n, seed) if seed % 2 else decaying(m, 3, seed) @ decaying(3, n, seed)
    k = min(m, n)
    found = sketched(G, k)
    torch.testing.assert_close(found.U * found.sigma[None] @ found.V.mT, G, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(G), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("power", "largest"), [(1.0, 0.9), (2.0, 0.6), (4.0, 0.2)])
def test_a_thin_sketch_finds_the_top_subspace_the_better_the_faster_the_spectrum_falls(power, largest):
    r = 2
    for seed in range(10):
        G = decaying(96, 64, seed, power)
        exact, thin = optimal_adapters(dense_svd(G), r, 1.0), sketched(G, 2 * r + 4, seed)
        both = torch.cat([exact.A, G @ exact.B / (G @ exact.B).norm(dim=0)], 1)  # the 2r top left directions
        assert angle(thin.U, both) < largest


def test_a_batch_is_solved_as_one_by_one():
    G = torch.stack([decaying(10, 8, seed) for seed in range(5)])
    c = torch.tensor([0.1, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    together = optimal_adapters(dense_svd(G), 2, c)
    for i in range(5):
        alone = optimal_adapters(dense_svd(G[i]), 2, float(c[i]))
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[i], other)
