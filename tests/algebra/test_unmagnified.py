"""The basis of a factor: what it is, what it leaves out, and that it does not depend on how a product is split."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra.unmagnified import corrected_decay, factor_basis

SEEDS = st.integers(0, 999)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(length=st.integers(4, 12), r=st.integers(1, 4), lost=st.integers(0, 4), seed=SEEDS)
def test_it_is_the_singular_value_decomposition_of_what_there_is(length, r, lost, seed):
    rank = max(0, r - lost)
    Y = normal(length, rank, seed=seed) @ normal(rank, r, seed=seed + 1)
    basis = factor_basis(Y)
    torch.testing.assert_close((basis.Q * basis.sigma) @ basis.V.mT, Y)
    assert int((basis.sigma > 0).sum()) == rank
    torch.testing.assert_close(basis.Q.mT @ basis.Q, (basis.sigma > 0).double().diag(), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis.Q @ basis.Q.mT, Y @ torch.linalg.pinv(Y, rtol=1e-7), rtol=0, atol=1e-6)


@given(r=st.integers(1, 4), seed=SEEDS)
def test_gradients_and_steps_in_its_coordinates(r, seed):
    G, Y, M = normal(7, 9, seed=seed), normal(9, r, seed=seed + 1), normal(7, r, seed=seed + 2)
    basis = factor_basis(Y)
    torch.testing.assert_close(basis.unmagnify(G @ Y), G @ basis.Q)
    torch.testing.assert_close(basis.magnify(M) @ Y.mT, M @ basis.Q.mT)
    other = factor_basis(Y @ normal(r, r, seed=seed + 3))
    torch.testing.assert_close(other.Q @ other.Q.mT, basis.Q @ basis.Q.mT, rtol=0, atol=1e-6)


@given(seed=SEEDS)
def test_float32_is_orthonormal_to_its_last_digits(seed):
    turned = torch.linalg.qr(normal(4, 4, seed=seed + 1)).Q
    Y = normal(40, 4, seed=seed) @ torch.tensor([1.0, 1e-1, 1e-2, 1e-3]).double().diag() @ turned
    Q = factor_basis(Y.float()).Q.double()
    torch.testing.assert_close(Q.mT @ Q, torch.eye(4).double(), rtol=0, atol=1e-6)


@given(beta=st.floats(0.5, 0.999), seed=SEEDS)
def test_a_corrected_decay_is_adams_correction(beta, seed):
    plain = corrected = torch.zeros(())
    for step, g in enumerate(normal(6, seed=seed), 1):
        plain = beta * plain + (1 - beta) * g
        decay = corrected_decay(beta, step)
        corrected = decay * corrected + (1 - decay) * g
        torch.testing.assert_close(corrected, plain / (1 - beta**step))
