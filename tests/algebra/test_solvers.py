"""The batched solver against scipy's, one problem at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from scalora.algebra.solvers import solve_nonnegative


def _problems(seed: int, batch: int, rows: int, k: int, spread: float):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(batch, rows, k, generator=generator, dtype=torch.float64)
    M = M * torch.exp(spread * torch.randn(batch, 1, k, generator=generator, dtype=torch.float64))
    M = M / M.norm(dim=1, keepdim=True)
    return M, torch.randn(batch, rows, generator=generator, dtype=torch.float64)


@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0, 3))
def test_equals_scipy(seed, k, spread):
    M, b = _problems(seed, batch=4, rows=k + 5, k=k, spread=spread)
    solution = solve_nonnegative(M.mT @ M, (M.mT @ b[..., None])[..., 0])
    assert solution.converged.all()
    for x, M_i, b_i in zip(solution.x, M, b, strict=True):
        expected, _ = nnls(M_i.numpy(), b_i.numpy())
        np.testing.assert_allclose(x.numpy(), expected, atol=1e-7)


def test_optimality_conditions_hold_on_correlated_columns():
    common = torch.randn(64, 30, 1, dtype=torch.float64)
    M = common + 0.05 * torch.randn(64, 30, 24, dtype=torch.float64)
    M = M / M.norm(dim=1, keepdim=True)
    S, h = M.mT @ M, (M.mT @ torch.randn(64, 30, 1, dtype=torch.float64))[..., 0]
    x, converged = solve_nonnegative(S, h)
    gradient = (S @ x[..., None])[..., 0] - h
    assert converged.all()
    assert (x >= 0).all()
    assert (gradient > -1e-8).all()
    assert (x * gradient).abs().max() < 1e-8


def test_says_when_it_did_not_converge():
    M, b = _problems(0, batch=16, rows=40, k=30, spread=0.0)
    solution = solve_nonnegative(M.mT @ M, (M.mT @ b[..., None])[..., 0], max_iterations=1)
    assert not solution.converged.all()
    assert (solution.x >= 0).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_any_leading_dimensions(shape):
    S, h = torch.eye(4).double().expand(*shape, 4, 4), torch.tensor([1.0, -1.0, 2.0, 0.0]).double().expand(*shape, 4)
    assert torch.equal(solve_nonnegative(S, h).x, h.clamp(min=0))
