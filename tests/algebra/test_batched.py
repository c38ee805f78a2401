"""Stacks of one size in one call, and bases from Cholesky factors alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra.batched import orthonormal, together


@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=6))
def test_each_stack_gets_what_it_would_get_alone(sizes):
    stacks = [torch.randn(L, k, k, dtype=torch.float64) for L, k in sizes]
    calls = []

    def both(X):
        calls.append(X.shape[1:])
        return X @ X.mT, X.sum((-2, -1))

    found = together(both, stacks)
    assert len(calls) == len(set(calls)) == len({k for _, k in sizes})
    for X, (product, total) in zip(stacks, found, strict=True):
        torch.testing.assert_close((product, total), (X @ X.mT, X.sum((-2, -1))))


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
@pytest.mark.parametrize("n", [8, 200])
@given(decades=st.integers(0, 6), scale=st.sampled_from([1e-12, 1.0, 1e12]), seed=st.integers(0, 99))
def test_a_basis_is_orthonormal_and_spans_what_there_is(n, rank, decades, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    Phi = torch.linalg.qr(torch.randn(2, n, 8, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(2, n, n, generator=generator))[0][..., :rank]
    C = (V * scale * torch.logspace(0, -decades, max(rank, 1))[:rank]) @ V.mT
    X = C @ Phi
    (Q,) = orthonormal([X], [Phi])
    torch.testing.assert_close(Q.mT @ Q, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), rtol=0, atol=1e-9)
    left = X.double() - Q @ (Q.mT @ X.double())
    assert (left.norm(dim=(-2, -1)) <= 2e-6 * X.double().norm(dim=(-2, -1))).all()
