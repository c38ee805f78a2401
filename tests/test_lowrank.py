import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.lowrank import effective_rank, numerical_rank, singular_values, truncate


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
