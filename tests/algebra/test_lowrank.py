import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra.lowrank import effective_rank, numerical_rank, singular_values, truncate


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.integers(1, 16), st.integers(1, 20))
def test_truncation_equals_the_dense_svd(seed, m, n, k, rank):
    generator = torch.Generator().manual_seed(seed)
    P, Q = (torch.randn(2, d, k, generator=generator, dtype=torch.float64) for d in (m, n))
    P[..., k // 2] = 0  # an empty slot
    dense = P @ Q.mT
    U, sigma, Vt = torch.linalg.svd(dense, full_matrices=False)
    best = truncate(P, Q, rank)
    assert best.P.shape == (2, m, rank)
    assert best.Q.shape == (2, n, rank)
    expected = U[..., :rank] * sigma[..., None, :rank] @ Vt[..., :rank, :]
    torch.testing.assert_close(best.P @ best.Q.mT, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(best.discarded, (dense - expected).square().sum((-2, -1)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(best.total, dense.square().sum((-2, -1)))
    values = singular_values(P, Q)
    torch.testing.assert_close(values, sigma[..., : values.shape[-1]], rtol=0, atol=1e-9)
    assert torch.equal(numerical_rank(values, m, n), torch.linalg.matrix_rank(dense, rtol=max(m, n) * 1.1920929e-07))


def test_effective_rank_counts_equal_directions_and_little_of_small_ones():
    sigma = torch.tensor([[2.0, 2, 2, 0], [1, 0, 0, 0], [1, 1e-6, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(effective_rank(sigma), torch.tensor([3.0, 1, 1, 0]), rtol=0, atol=1e-4)


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(2, 12), st.integers(1, 8), st.integers(1, 8))
def test_truncation_after_truncation_equals_the_dense_svd(seed, m, n, kept, added):
    """Columns that an earlier truncation settled need no factorisation; dead ones and full spaces included."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -3, kept + added)
    P, Q = (torch.randn(2, d, kept + added, generator=generator) for d in (m, n))
    first = truncate(P * sizes, Q, kept)
    P, Q = (
        torch.cat([old, torch.randn(2, d, added, generator=generator)], -1) for d, old in ((m, first.P), (n, first.Q))
    )
    dense = P.double() @ Q.double().mT
    sigma = torch.linalg.svdvals(dense)
    best = truncate(P, Q, kept, settled=kept)
    error = (dense - best.P.double() @ best.Q.double().mT).square().sum((-2, -1)).sqrt()
    optimum = sigma[..., kept:].square().sum(-1).sqrt()
    assert (error <= optimum * (1 + 1e-3) + 1e-5 * sigma[..., 0]).all()


def test_a_thousand_truncations_keep_what_one_in_float64_keeps():
    generator = torch.Generator().manual_seed(0)
    P, Q = torch.zeros(1, 40, 8), torch.zeros(1, 30, 8)
    dense, lost = torch.zeros(40, 30, dtype=torch.float64), 0.0
    for _ in range(1000):
        new_P, new_Q = (torch.randn(1, d, 2, generator=generator) * 0.1 for d in (40, 30))
        wide_P, wide_Q = torch.cat([P, new_P], -1), torch.cat([Q, new_Q], -1)
        dense = (P.double() @ Q.double().mT + new_P.double() @ new_Q.double().mT)[0]
        best = truncate(wide_P, wide_Q, 8, settled=8)
        P, Q = best.P, best.Q
        optimum = torch.linalg.svdvals(dense)[8:].square().sum()
        error = (dense - (P.double() @ Q.double().mT)[0]).square().sum()
        lost = max(lost, float(error / optimum.clamp(min=1e-12)))
    assert lost < 1 + 1e-4
    for factor in (P, Q):  # still orthogonal columns
        cosines = torch.nn.functional.normalize(factor[0], dim=0)
        assert (cosines.T @ cosines - torch.eye(8)).abs().max() < 1e-4


def test_settled_columns_too_small_to_square_are_dropped():
    generator = torch.Generator().manual_seed(0)
    P, Q = torch.randn(1, 9, 4, generator=generator), torch.randn(1, 8, 4, generator=generator)
    P[..., 0] *= 1e-21
    Q[..., 1] = 0
    P[..., :2], _ = torch.linalg.qr(P[..., :2])
    P[..., 0] *= 1e-21
    best = truncate(P, Q, 2, settled=2)
    assert best.P.isfinite().all()
    assert best.Q.isfinite().all()
    alone = truncate(P[..., 2:], Q[..., 2:], 2)
    torch.testing.assert_close(best.P @ best.Q.mT, alone.P @ alone.Q.mT, rtol=1e-5, atol=1e-5)
