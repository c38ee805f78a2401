"""Directions in the inputs' metric: against dense algebra, and against Theorem 1 where all inputs are alike."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra.directions import dense_svd, optimal_adapters, range_basis
from scalora.algebra.metric import DAMPING, InputMetric, metric_adapters, no_metric, nystrom_metric

SEEDS = st.integers(0, 999)


def moments(n, seed, tail=0.01, leading=3):
    """C with a few large eigenvalues and equal small ones."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    e = torch.full((n,), tail, dtype=torch.float64)
    e[:leading] = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)[:leading]
    return (basis * e) @ basis.mT


def dense(C):
    """λ and M⁻¹, from the definition."""
    size = C.diagonal().mean()
    e, V = torch.linalg.eigh(C / size + DAMPING * torch.eye(len(C), dtype=C.dtype))
    return size, (V * e.rsqrt()) @ V.mT


def output(C, A, B):
    """Mean of |a (bᵀx)|² over inputs, of every pair of columns."""
    return torch.stack([a.square().sum() * (b @ C @ b) for a, b in zip(A.mT, B.mT, strict=True)])


def looked(C, k, times, seed=0, factor=1.0):
    basis = range_basis(torch.randn(len(C), k, generator=torch.Generator().manual_seed(seed), dtype=C.dtype))
    metric = no_metric(basis)
    for _ in range(times):
        metric = nystrom_metric(metric, factor * C @ metric.U, factor * C.trace())
    return metric


@given(n=st.integers(5, 12), seed=SEEDS, factor=st.sampled_from([1.0, 1e-4, 1e5]))
def test_a_few_leading_directions_are_found_and_equal_the_dense_metric(n, seed, factor):
    C = moments(n, seed)
    metric, (size, whitening) = looked(C, 4, 12, seed, factor), dense(C)
    X = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed + 1), dtype=C.dtype)
    torch.testing.assert_close(metric.whiten(X), whitening @ X, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metric.energy(X), (X * (C @ X)).sum(0) / size, rtol=1e-5, atol=1e-6)


@given(seed=SEEDS)
def test_each_look_comes_nearer(seed):
    C = moments(40, seed, tail=0.3)
    sizes = torch.linalg.eigvalsh(C / C.diagonal().mean())[-2:].flip(0)
    errors = [(looked(C, 3, times, seed).e[:2] - sizes).abs().max() for times in (1, 3, 9)]
    assert errors[0] > errors[2]
    assert errors[2] < 0.05 * sizes[0]


@given(m=st.integers(4, 9), n=st.integers(4, 9), r=st.integers(1, 2), seed=SEEDS)
def test_where_all_inputs_are_alike_it_is_theorem_1(m, n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(m, n, generator=generator, dtype=torch.float64)
    c = torch.tensor(0.7, dtype=torch.float64)
    Q = range_basis(G @ torch.randn(n, min(m, n), generator=generator, dtype=torch.float64))
    alike = looked(torch.eye(n, dtype=torch.float64), 2, 1, seed)
    found, wanted = metric_adapters(Q, G.mT @ Q, alike, r, c), optimal_adapters(dense_svd(G), r, c)
    # But for the size of A: a step of B has n entries where one of A has m.
    of_A = (m / n) ** 0.5
    for one, other, size in zip(found, wanted, (of_A, 1.0, 1.0, of_A), strict=True):  # signs are free
        torch.testing.assert_close(one @ one.mT, size**2 * other @ other.mT, rtol=1e-6, atol=1e-8)


@given(m=st.integers(5, 9), n=st.integers(5, 9), r=st.integers(1, 2), seed=SEEDS)
def test_adapters_are_those_of_the_whitened_gradient_and_know_their_gradients(m, n, r, seed):
    C, generator = moments(n, seed), torch.Generator().manual_seed(seed)
    G = torch.randn(m, n, generator=generator, dtype=torch.float64)
    size, whitening = dense(C)
    svd = dense_svd(G @ whitening)
    Q = range_basis(G @ torch.randn(n, min(m, n), generator=generator, dtype=torch.float64))
    new = metric_adapters(Q, G.mT @ Q, looked(C, n, 1, seed), r, torch.tensor(2.0, dtype=torch.float64))
    A, B = svd.U[:, 0 : 2 * r : 2], whitening @ svd.V[:, 1 : 2 * r : 2]
    B = B * (2 * size / (B * (C @ B)).sum(0)).sqrt()
    turned = output(C, A, torch.sign(G.mT @ A)).clamp_min(DAMPING * n * size)
    A = A * (output(C, torch.ones(m, r), B) / turned).sqrt()
    torch.testing.assert_close(new.A @ new.A.mT, A @ A.mT, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(new.B @ new.B.mT, B @ B.mT, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(new.grad_A, G @ new.B)
    torch.testing.assert_close(new.grad_B, G.mT @ new.A)


def test_a_layer_with_nothing_to_go_by_keeps_its_metric_beside_others_that_change():
    C = torch.stack([moments(8, seed) for seed in range(4)])
    each = [looked(c, 3, 2, seed) for seed, c in enumerate(C)]
    former = InputMetric(*map(torch.stack, zip(*each, strict=True)))
    products, traces = C @ former.U, C.diagonal(dim1=1, dim2=2).sum(1)
    products[0], traces[0] = 0.0, 0.0
    products[1, 2, 1], traces[2] = torch.nan, torch.inf
    found = nystrom_metric(former, products, traces)
    for kept in range(3):
        for new, old in zip(found, former, strict=True):
            assert torch.equal(new[kept], old[kept])
    alone = nystrom_metric(each[3], C[3] @ each[3].U, C[3].trace())
    torch.testing.assert_close((found.e[3], found.tail[3]), (alone.e, alone.tail))
