"""α-LoRA's theory: the closed forms against a dense twin and against Monte Carlo."""

import json
from math import sqrt

import pytest
import torch

from scalora_papers.alpha_theory import (
    Target,
    Transfer,
    accuracy,
    alpha_by_scan,
    alpha_star,
    limits,
    mean_and_error,
    measure_panel,
    ridge,
    simulate,
)

TARGETS = [
    Target(mu2=2.25, eta=10.0, gamma=1.0, c=0.3, w2=0.2),
    Target(mu2=1.0, eta=0.5, gamma=0.1, c=-0.4, w2=0.5),
    Target(mu2=4.0, eta=2.0, gamma=3.0, c=1.9, w2=0.95),
    Target(mu2=0.5, eta=1.0, gamma=1.0, c=0.0, w2=1.0),
]


def dense_limits(target: Target, alpha: float) -> tuple[float, float]:
    """The twin: Q̄ as a matrix, δ by iteration, everything that holds a Q² by a difference in γ."""
    w = torch.tensor([target.c / sqrt(target.mu2), 0.0, 0.0], dtype=torch.float64)
    mu = torch.tensor([sqrt(target.mu2), 0.0, 0.0], dtype=torch.float64)
    w[1] = sqrt(target.w2 - float(w @ w))
    identity = torch.eye(3, dtype=torch.float64)

    def with_one_q(gamma):
        delta = target.eta
        for _ in range(2000):
            delta = target.eta / (1 / (1 + delta) + gamma)  # tr(Q̄)/n; μ_β moves one eigenvalue of p
        Q = torch.linalg.inv((identity + torch.outer(mu, mu)) / (1 + delta) + gamma * identity)
        fitted = Q @ mu / (1 + delta)  # Q Xy/n
        return Q, fitted, (delta + mu @ fitted) / (1 + delta)  # yᵀXᵀQXy/n²

    step, gamma = 1e-5, target.gamma
    above, below = with_one_q(gamma + step), with_one_q(gamma - step)
    QQ, Qfitted, squares = ((b - a) / (2 * step) for a, b in zip(above, below, strict=True))
    Q, fitted, _ = with_one_q(gamma)
    mean = mu @ (alpha * gamma * Q @ w + fitted)
    return float(mean), float((alpha * gamma) ** 2 * w @ QQ @ w + 2 * alpha * gamma * w @ Qfitted + squares)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.7, 3.0])
def test_limits_equal_the_dense_twin(target, alpha):
    assert [float(x) for x in limits(target, torch.tensor(alpha))] == pytest.approx(
        dense_limits(target, alpha), rel=1e-5
    )


@pytest.mark.parametrize("target", TARGETS)
def test_the_closed_form_is_the_best_alpha(target):
    assert alpha_star(target) == pytest.approx(alpha_by_scan(target), abs=1e-5)


@pytest.mark.parametrize(
    "task",
    [
        Transfer(p=120, N=600, n=60, beta=0.5),
        Transfer(p=120, N=300, n=480, beta=0.9, gamma=0.3, gamma_source=2.0),
        Transfer(p=150, N=600, n=30, beta=-0.4, mu=1.0, gamma=2.0),
        Transfer(p=100, N=400, n=100, beta=1.0, mu=2.0),
    ],
)
def test_theory_equals_monte_carlo(task):
    alphas = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    mean, error = mean_and_error(simulate(task, alphas, draws=60, seed=0))
    assert ((mean - accuracy(task.target(), alphas)).abs() <= 3 * error).all()
    assert error.max() < 0.01  # and that says something


def test_the_simulated_classifier_is_the_ridge_regression_about_the_source():
    """a minimises ‖Xᵀ(αw̃ + a) − y‖²/n + γ‖a‖²."""
    X, w, y = torch.randn(7, 5).double(), torch.randn(7).double(), torch.ones(5).double()
    a = ridge(X, (X @ (y - 0.6 * X.T @ w) / 5)[:, None], 0.4)[:, 0]
    stacked = torch.cat([X.T / sqrt(5), sqrt(0.4) * torch.eye(7).double()])
    wanted = torch.cat([(y - 0.6 * X.T @ w) / sqrt(5), torch.zeros(7).double()])
    assert torch.allclose(a, torch.linalg.lstsq(stacked, wanted).solution)


def test_an_unrelated_source_is_best_ignored_and_an_opposed_one_subtracted():
    assert alpha_star(Transfer(100, 500, 50, beta=0.0).target()) == 0
    assert alpha_star(Transfer(100, 500, 50, beta=-0.5).target()) < 0


def test_a_measurement_is_json_and_finds_the_best_alpha():
    found = json.loads(json.dumps(measure_panel(Transfer(p=60, N=300, n=60, beta=0.7), draws=40, seed=0)))
    assert abs(found["alpha_drawn"] - found["alpha_formula"]) <= 3 * found["alpha_drawn_error"] + found["step"]
    gain = found["gains"]["0"]
    assert abs(gain["mean"] - gain["theory"]) <= 3 * gain["error"]
    assert gain["mean"] > 5 * gain["error"]
