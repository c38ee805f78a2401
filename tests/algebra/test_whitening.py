"""White coordinates: against dense algebra, and against Theorem 1 where there is nothing to whiten."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra.directions import dense_svd, optimal_adapters, range_basis
from scalora.algebra.whitening import DAMPING, Seen, no_whitening, nystrom, white_adapters

SEEDS = st.integers(0, 999)
EXPONENTS = st.sampled_from([0.125, 0.25, 0.5])


def moments(n, seed, tail=0.01, leading=3):
    """C with a few large eigenvalues and equal small ones."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    e = torch.full((n,), tail, dtype=torch.float64)
    e[:leading] = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)[:leading]
    return (basis * e) @ basis.mT


def dense(C, power):
    """M with p and M⁻¹ with −p, from the definition."""
    e, V = torch.linalg.eigh(C / C.diagonal().mean() + DAMPING * torch.eye(len(C), dtype=C.dtype))
    return (V * e.pow(power)) @ V.mT


def looked(C, k, times, seed=0, factor=1.0, exponent=0.25):
    basis = range_basis(torch.randn(len(C), k, generator=torch.Generator().manual_seed(seed), dtype=C.dtype))
    white = no_whitening(basis, exponent)
    for _ in range(times):
        (white,) = nystrom([Seen(white, factor * C @ white.U, factor * C.trace())], 0.0)
    return white


@given(n=st.integers(5, 12), seed=SEEDS, factor=st.sampled_from([1.0, 1e-4, 1e5]), p=EXPONENTS)
def test_a_few_leading_directions_are_found_and_equal_the_dense_whitening(n, seed, factor, p):
    C = moments(n, seed)
    white = looked(C, 4, 12, seed, factor, p)
    X = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed + 1), dtype=C.dtype)
    torch.testing.assert_close(white.whiten(X), dense(C, -p) @ X, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(white.color(X), dense(C, p) @ X, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(white.color(white.whiten(X)), X)


@given(seed=SEEDS)
def test_each_look_comes_nearer(seed):
    C = moments(40, seed, tail=0.3)
    sizes = torch.linalg.eigvalsh(C / C.diagonal().mean())[-2:].flip(0)
    errors = [(looked(C, 3, times, seed).e[:2] - sizes).abs().max() for times in (1, 3, 9)]
    assert errors[0] > errors[2]
    assert errors[2] < 0.05 * sizes[0]


@given(keep=st.floats(0.1, 0.9), seed=SEEDS)
def test_what_was_known_is_kept_in_part(keep, seed):
    old, new = moments(6, seed), 7 * moments(6, seed + 1)  # as many directions as there are: nothing is lost
    former = looked(old, 6, 2, seed)
    (found,) = nystrom([Seen(former, new @ former.U, new.trace())], keep)
    mean = keep * old / old.diagonal().mean() + (1 - keep) * new / new.diagonal().mean()
    torch.testing.assert_close((found.U * found.e) @ found.U.mT, mean, rtol=1e-6, atol=1e-8)


def test_what_is_nothing_finite_teaches_nothing():
    former = looked(moments(6, 0), 3, 2)
    product = former.U.clone()
    for bad in (product * torch.nan, product * torch.inf):
        for trace in (torch.tensor(1.0), torch.tensor(torch.nan)):
            (found,) = nystrom([Seen(former, bad, trace.double())], 0.5)
            assert all(torch.equal(one, other) for one, other in zip(found.tensors, former.tensors, strict=True))
    (found,) = nystrom([Seen(former, 0 * product, torch.tensor(0.0).double())], 0.5)
    assert all(torch.equal(one, other) for one, other in zip(found.tensors, former.tensors, strict=True))


@given(m=st.integers(5, 9), n=st.integers(5, 9), r=st.integers(1, 2), seed=SEEDS, plain=st.booleans(), p=EXPONENTS)
def test_adapters_are_theorem_1_of_the_whitened_gradient(m, n, r, seed, plain, p):
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(m, n, generator=generator, dtype=torch.float64)
    c = torch.tensor(0.7, dtype=torch.float64)
    # Where all directions are alike, M is but a number.
    C, D = (torch.eye(k, dtype=G.dtype) if plain else moments(k, seed + k) for k in (n, m))
    inputs, outputs = (looked(X, 5, 12, seed, exponent=p) for X in (C, D))
    N, M = dense(D, p), dense(C, p)
    white = N.inverse() @ G @ M.inverse()
    L = N.inverse() @ range_basis(white @ torch.randn(n, min(m, n), generator=generator, dtype=torch.float64))
    found, wanted = white_adapters(L, G.mT @ L, outputs, inputs, r, c), optimal_adapters(dense_svd(white), r, c)
    for one, other in zip((N @ found.A, M @ found.B, *found[2:]), wanted, strict=True):  # signs are free
        torch.testing.assert_close(one @ one.mT, other @ other.mT, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.grad_A, white @ M @ found.B, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.grad_B, white.mT @ N @ found.A, rtol=1e-4, atol=1e-6)
