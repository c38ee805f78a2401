"""The landing field against its n×n form, and its two parts: along the manifold, and back to it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra.landing import landing_field, nearest_orthonormal

SIZES = {"n": st.integers(4, 20), "r": st.integers(1, 4), "seed": st.integers(0, 999)}


def matrices(n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, n, r, generator=generator, dtype=torch.float64)


@given(penalty=st.floats(0, 10), **SIZES)
def test_it_is_the_dense_form(n, r, seed, penalty):
    X, gradient = matrices(n, r, seed)
    skew = gradient @ X.mT - X @ gradient.mT
    dense = skew @ X + penalty * X @ (X.mT @ X - torch.eye(r, dtype=X.dtype))
    torch.testing.assert_close(landing_field(X, gradient, penalty), dense, rtol=1e-10, atol=1e-10)


@given(**SIZES)
def test_without_a_penalty_it_is_tangent(n, r, seed):
    """XᵀX does not change to first order, wherever X is; and it goes down with the gradient on the manifold."""
    X, gradient = matrices(n, r, seed)
    field = landing_field(X, gradient, 0.0)
    change = X.mT @ field + field.mT @ X
    torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-9)
    Q = torch.linalg.qr(X).Q
    assert ((landing_field(Q, gradient, 0.0) * gradient).sum((-2, -1)) >= -1e-12).all()


@given(penalty=st.floats(0.1, 1.0), **SIZES)
def test_the_penalty_leads_back(n, r, seed, penalty):
    X = torch.linalg.qr(matrices(n, r, seed)[0]).Q * (1 + 0.1 * (-1) ** seed)
    distances = []
    for _ in range(2):
        distances.append(torch.linalg.matrix_norm(X.mT @ X - torch.eye(r, dtype=X.dtype)))
        X = X - 0.1 * landing_field(X, torch.zeros_like(X), penalty)
    assert (distances[1] < distances[0]).all()


@given(**SIZES)
def test_orthonormal_columns_without_a_gradient_stand_still(n, r, seed):
    Q = torch.linalg.qr(matrices(n, r, seed)[0]).Q
    assert landing_field(Q, torch.zeros_like(Q), 5e-3).abs().max() < 1e-14


@given(**SIZES)
def test_the_nearest_orthonormal_columns_are_those_of_the_dense_decomposition(n, r, seed):
    X = matrices(n, r, seed)[0]
    U, _, Vt = torch.linalg.svd(X, full_matrices=False)
    found = nearest_orthonormal(X)
    torch.testing.assert_close(found, U @ Vt, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(nearest_orthonormal(found), found, rtol=0, atol=1e-10)


def test_where_there_are_none_nothing_changes():
    X = matrices(8, 2, 0)[0]
    X[0, :, 1] = X[0, :, 0]
    X[1, 0, 0] = float("nan")
    torch.testing.assert_close(nearest_orthonormal(X)[:2], X[:2], rtol=0, atol=0, equal_nan=True)
