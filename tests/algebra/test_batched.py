"""Stacks of one size in one call, and bases from Cholesky factors alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra import lowrank
from scalora.algebra.batched import block_jacobi, orthonormal, together


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


@pytest.mark.parametrize("k", [33, 64, 96])
@given(decades=st.integers(0, 12), missing=st.integers(0, 20), seed=st.integers(0, 99))
def test_turning_pairs_of_blocks_finds_the_eigenvectors(k, decades, missing, seed):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(2, k, k, generator=generator, dtype=torch.float64))[0]
    e = torch.logspace(0, -decades, k, dtype=torch.float64) * (torch.arange(k) < k - missing)
    S = (Q * e) @ Q.mT
    w, V = block_jacobi((S + S.mT) / 2)
    torch.testing.assert_close(w, e.flip(0).expand(2, k), rtol=0, atol=1e-9)
    torch.testing.assert_close(V.mT @ V, torch.eye(k, dtype=torch.float64).expand(2, k, k), rtol=0, atol=1e-10)
    assert (V.mT @ S @ V - torch.diag_embed(w)).abs().max() < 1e-9


def test_matrices_that_hold_nothing_have_eigenvectors_too():
    w, V = block_jacobi(torch.zeros(2, 40, 40, dtype=torch.float64))
    assert not w.any()
    torch.testing.assert_close(V.mT @ V, torch.eye(40, dtype=torch.float64).expand(2, 40, 40))


@given(seed=st.integers(0, 99), noise=st.sampled_from([1.0, 1e-2, 1e-5]))
def test_a_recompression_by_pairs_of_blocks_leaves_out_no_more(seed, noise):
    """64 settled columns and four events, whose columns are hardly more than eight."""
    generator = torch.Generator().manual_seed(seed)

    def few(n):
        start = torch.randn(2, n, 8, generator=generator)
        return torch.cat([start + noise * torch.randn(2, n, 8, generator=generator) for _ in range(4)], -1)

    P, Q = (torch.randn(2, n, 64, generator=generator) * torch.logspace(0, -2, 64) for n in (150, 120))
    settled = lowrank.truncate(P, Q, 64)
    P, Q = torch.cat([settled.P, 0.1 * few(150)], -1), torch.cat([settled.Q, few(120)], -1)
    wanted = lowrank.truncate(P, Q, 64, settled=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank, "eigh", lambda S: block_jacobi(S) if S.shape[-1] > 32 else torch.linalg.eigh(S))
        found = lowrank.truncate(P, Q, 64, settled=64)
    left, least = ((P.double() @ Q.double().mT - x.P.double() @ x.Q.double().mT).norm() for x in (found, wanted))
    assert left <= least * (1 + 1e-6)
    torch.testing.assert_close(found.discarded, wanted.discarded, rtol=1e-4, atol=1e-6)
