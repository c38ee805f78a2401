"""Fig. 1 at 16×16, r = 2: what the mathematics promises of every method, and what is written down."""

import json

import pytest
import torch

from scalora.algebra.directions import dense_svd, optimal_adapters
from scalora.algebra.scaling import SolutionKind, optimal_scaling
from scalora_papers import Setting
from scalora_papers import fig1_linear_regression as linear_regression
from scalora_papers.fig1_linear_regression import METHODS, LinearRegression, descend, draw_problem

N, R, STEPS, RATE, HIGH = 16, 2, 60, 0.02, 1.0


class Small(LinearRegression):
    n, r, steps, rates = N, R, STEPS, (RATE, HIGH)
    seeds = {"small": 2}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return Small().run(Setting("small", tmp_path_factory.mktemp("fig1"), log=lambda line: None))


@pytest.fixture(scope="module")
def task():
    return draw_problem(N, R, 2)


@pytest.fixture(scope="module")
def found(task):
    return {name: descend(task, choose, [RATE], STEPS, range(STEPS + 1)) for name, choose in METHODS.items()}


def test_full_gradient_descent_is_the_closed_form(task, found):
    """W = 0 at first, so the residual after t steps is −(I − XXᵀ/L)ᵗ Y."""
    contraction = torch.eye(N) - task.X @ task.X.mT / task.L[:, None, None]
    residual = torch.linalg.matrix_power(contraction, STEPS) @ task.Y
    torch.testing.assert_close(found["full"].final[0], 0.5 * residual.square().sum((-2, -1)))


def test_the_losses_are_in_the_order_of_the_freedom_of_their_steps(found):
    loss = {name: curves.final.mean().item() for name, curves in found.items()}
    assert loss["full"] < loss["oracle"] < loss["ScaLoRA"] < 0.7 * loss["LoRA"]
    assert loss["non-negative"] < 0.7 * loss["LoRA"]
    assert loss["scalar-only"] < 0.7 * loss["LoRA"]


def test_rank_grows_for_all_but_lora(found):
    assert (found["LoRA"].rank[1:] == R).all()
    for name in METHODS.keys() - {"LoRA"}:
        assert (found[name].rank[-1] > 3 * R).all(), name
    for name in ("ScaLoRA", "oracle"):  # a step of A and B changes W by rank 2r at most
        assert (found[name].rank.diff(dim=0) <= 2 * R).all()


def test_no_loss_exceeds_its_bound(found):
    for name, curves in found.items():
        assert (curves.loss[1:] <= curves.bound * (1 + 1e-12)).all(), name
        assert (curves.alignment <= 1 + 1e-12).all(), name
    torch.testing.assert_close(found["full"].alignment, torch.ones_like(found["full"].alignment))
    # −G/L is the least of the bound: at W = 0, where all start, no other step has a lower one.
    assert all((curves.bound[0] >= found["full"].bound[0] - 1e-9).all() for curves in found.values())


def test_carrying_w_alone_is_algorithm_1(task, found):
    """The same run with the difference moved to W_pt explicitly."""
    X, Y = task.X[0], task.Y[0]
    W_pt, A, B = torch.zeros(N, N).double(), torch.zeros(N, R).double(), task.B[0]
    for _ in range(STEPS):
        G = X.mT @ (X @ (W_pt + A @ B.mT) - Y)
        alpha, beta, kind = optimal_scaling(A, B, G @ B, G.mT @ A, c=1 / (task.L[0] * RATE))
        assert kind != SolutionKind.NONE
        W_pt = W_pt + A @ torch.diag(1 - alpha * beta) @ B.mT
        A, B = A * alpha, B * beta
        A, B = A - RATE * G @ B, B - RATE * G.mT @ A
    loss = 0.5 * (X @ (W_pt + A @ B.mT) - Y).square().sum()
    assert loss.item() == pytest.approx(found["ScaLoRA"].final[0, 0].item(), rel=1e-6)


def test_the_oracle_is_the_library_s(task):
    G = torch.randn(2, 1, N, N, dtype=torch.float64)
    c = torch.tensor([0.3, 0.7]).double()[:, None]
    A, B = linear_regression.oracle(G, torch.zeros(2, 1, N, R).double(), task.B[:, None], c)
    for i in range(2):
        known = optimal_adapters(dense_svd(G[i, 0]), R, c[i, 0].item())
        torch.testing.assert_close(A[i, 0], known.A)
        torch.testing.assert_close(B[i, 0], known.B)


def test_what_is_written_and_drawn(outcome):
    runs = json.loads(json.dumps(outcome.content, allow_nan=False))["runs"]
    assert len(runs) == 2 * (len(METHODS) - 1) + 1
    for run in runs:
        assert len(run["loss"]) == len(outcome.content["curves_at_steps"]) == len(run["bound"]) + 1
    assert set(outcome.figures) == {"fig1", "rates"}
    assert len(outcome.figures["fig1"].axes) == 4
    assert all(figure.canvas is not None for figure in outcome.figures.values())
    assert outcome.remarks


def test_a_diverged_run_is_shown_as_such(outcome):
    run = next(r for r in outcome.content["runs"] if (r["method"], r["eta"]) == ("LoRA", HIGH))
    assert run["diverged_seeds"] == [0, 1]
    assert run["final_loss_by_seed"] == [None, None]
    row = next(row for row in outcome.tables[0].rows if row[:2] == ["LoRA", "1"])
    assert row[2] == "(diverged: 2 of 2)"
    assert any("× 2" in text.get_text() for text in outcome.figures["rates"].axes[0].texts)
