import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra.lowrank import numerical_rank
from scalora.methods.method import Spectrum


@given(st.integers(0, 2**31), st.integers(1, 24), st.integers(1, 24), st.integers(0, 8), st.floats(1e-6, 1e3))
def test_the_singular_values_of_a_dense_update_are_those_of_an_svd(seed, m, n, rank, scale):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, m, n)
    U = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
    sigma = scale * torch.logspace(0, -3, rank, dtype=torch.float64)
    update = (U * sigma @ V.mT).float()
    spectrum = Spectrum.of(update)
    assert spectrum.sigma.shape == (min(m, n),)
    assert (spectrum.m, spectrum.n) == (m, n)
    torch.testing.assert_close(
        spectrum.sigma, torch.linalg.svdvals(update.double()).float(), rtol=1e-5, atol=1e-6 * scale
    )
    assert int(numerical_rank(*spectrum)) == rank
