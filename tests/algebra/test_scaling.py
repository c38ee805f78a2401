"""The closed forms against their dense twin, their invariances, and the inputs that break naive code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra import reference
from scalora.algebra.gram import gram_products, product_norm
from scalora.algebra.scaling import SolutionKind, calibrate, optimal_scaling

METHODS = ("paper", "nonnegative", "scalar", "normalize")


def _problem(seed, m, n, r, *, case="random", dtype=torch.float32, spread=0.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    G, A, B = normal(m, n), normal(m, r) / m**0.5, normal(n, r) / n**0.5
    A, B = A * torch.exp(spread * normal(1, r)), B * torch.exp(spread * normal(1, r))
    if case == "start":
        B = torch.zeros_like(B)
    elif case == "start-mirrored":
        A = torch.zeros_like(A)
    elif case == "rank-one gradient":
        G = torch.outer(G[:, 0], G[0])
    elif case == "repeated columns" and r > 1:
        A[:, 1], B[:, 1] = A[:, 0], B[:, 0]
    elif case == "aligned":  # adapters along singular directions, as training makes them
        U, _, V = torch.linalg.svd(G)
        A, B = U[:, :r] + 0.1 * A, V[:r].T + 0.1 * B
    return tuple(t.to(dtype) for t in (G, A, B))


def _solve(G, A, B, **options):
    return optimal_scaling(A, B, G @ B, G.T @ A, **options)


CASES = ("random", "start", "start-mirrored", "rank-one gradient", "repeated columns", "aligned")


@pytest.mark.parametrize("method", METHODS)
def test_objective_equals_the_reference_on_1000_problems(method):
    generator = torch.Generator().manual_seed(7)
    kinds = set()
    for seed in range(1000):
        m, n, r = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((8, 24), (8, 24), (1, 5)))
        c = float(torch.rand((), generator=generator) * 3 + 0.01)
        spread = float(torch.rand((), generator=generator))
        G, A, B = _problem(seed, m, n, r, case=CASES[seed % len(CASES)], spread=spread)
        ours, theirs = _solve(G, A, B, c=c, method=method), reference.reference_scaling(G, A, B, c=c, method=method)
        scale = c**2 * float(G.double().square().sum())
        got = reference.objective(G, A, B, ours.alpha, ours.beta, c)
        best = reference.objective(G, A, B, theirs.alpha, theirs.beta, c)
        assert abs(got - best) <= 1e-6 * max(best, 1e-2 * scale), (seed, got, best)
        assert ours.kind == theirs.kind
        kinds.add(theirs.kind)
    assert (
        kinds
        == {
            "paper": {SolutionKind.COLUMN, SolutionKind.SCALAR},
            "nonnegative": {SolutionKind.NONNEGATIVE},
            "scalar": {SolutionKind.SCALAR},
            "normalize": {SolutionKind.NORMALIZE},
        }[method]
    )


@given(st.integers(0, 2**31), st.sampled_from(CASES), st.floats(0, 2))
def test_the_constrained_optimum_is_never_worse_than_the_papers(seed, case, spread):
    G, A, B = _problem(seed, 20, 14, 4, case=case, dtype=torch.float64, spread=spread)
    losses = {}
    for method in METHODS:
        alpha, beta, _ = _solve(G, A, B, c=0.7, method=method)
        losses[method] = reference.objective(G, A, B, alpha, beta, 0.7)
    scale = 0.49 * float(G.square().sum())
    assert losses["nonnegative"] <= min(losses.values()) + 1e-9 * scale


@given(st.integers(0, 2**31), st.sampled_from(METHODS), st.floats(1e-3, 1e3))
def test_the_scale_of_the_gradient_does_not_matter(seed, method, scale):
    G, A, B = _problem(seed, 12, 10, 3, dtype=torch.float64)
    once, scaled = _solve(G, A, B, c=0.5, method=method), _solve(G * scale, A, B, c=0.5, method=method)
    torch.testing.assert_close(once.alpha, scaled.alpha, rtol=1e-8, atol=0)
    torch.testing.assert_close(once.beta, scaled.beta, rtol=1e-8, atol=0)


@given(
    st.integers(0, 2**31), st.sampled_from(METHODS), st.sampled_from(CASES), st.integers(-12, 12),
    st.integers(-12, 12), st.integers(-12, 12),
)  # fmt: skip
def test_wildly_unbalanced_input_gives_finite_positive_factors(seed, method, case, a, b, g):
    G, A, B = _problem(seed, 9, 11, 3, case=case)
    A, B, g_A, g_B = A * 10.0**a, B * 10.0**b, (G @ B) * 10.0**g, (G.T @ A) * 10.0**-g
    for column, power in ((0, 6), (1, -6)):  # and columns of very different size
        A[:, column] *= 10.0**power
    alpha, beta, _ = optimal_scaling(A, B, g_A, g_B, c=1.0, method=method)
    for factor in (alpha, beta):
        assert torch.isfinite(factor).all()
        assert (factor > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_solved_together_as_they_are_alone(method):
    problems = [_problem(seed, 10, 8, 3, case=CASES[seed % len(CASES)]) for seed in range(12)]
    A, B = torch.stack([p[1] for p in problems]), torch.stack([p[2] for p in problems])
    G = torch.stack([p[0] for p in problems])
    c = torch.linspace(0.1, 2, 12, dtype=torch.float64)
    shape = (3, 4)
    together = optimal_scaling(
        *(t.reshape(*shape, *t.shape[1:]) for t in (A, B, G @ B, G.mT @ A)), c=c.reshape(shape), method=method
    )
    for i, (G_i, A_i, B_i) in enumerate(problems):
        alone = _solve(G_i, A_i, B_i, c=float(c[i]), method=method)
        torch.testing.assert_close(together.alpha.reshape(12, 3)[i], alone.alpha, rtol=1e-4, atol=1e-6)
        assert together.kind.reshape(12)[i] == alone.kind


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["zero gradient", "non-finite gradient", "zero adapters", "c is NaN"])
def test_a_layer_without_a_usable_gradient_is_left_alone(method, what):
    G, A, B = _problem(0, 10, 8, 3)
    g_A, g_B, c = G @ B, G.T @ A, 1.0
    if what == "zero gradient":
        g_A, g_B = torch.zeros_like(g_A), torch.zeros_like(g_B)
    elif what == "non-finite gradient":
        g_A, g_B = g_A * float("nan"), g_B * float("inf")
    elif what == "zero adapters":
        A, B = torch.zeros_like(A), torch.zeros_like(B)
    else:
        c = float("nan")
    alpha, beta, kind = optimal_scaling(A, B, g_A, g_B, c=c, method=method)
    assert kind == SolutionKind.NONE
    assert (alpha == 1).all()
    assert (beta == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_column_falls_below_the_floor(method):
    c, floor, lowest = 0.3, 0.2, []
    for seed in range(50):
        G, A, B = _problem(seed, 20, 20, 4, case="aligned", dtype=torch.float64, spread=0.5)
        alpha, beta, _ = _solve(G, A, B, c=c, method=method, floor=floor)
        norms = torch.cat([A.norm(dim=0) * alpha, B.norm(dim=0) * beta])
        assert norms.min() >= floor * c**0.5 * (1 - 1e-9)
        lowest.append(float(norms.min()))
    if method == "nonnegative":  # the floor is met, not merely never tested
        assert min(lowest) == pytest.approx(floor * c**0.5)


def test_calibration_keeps_the_factor_that_carries_the_scale():
    for case in ("start", "start-mirrored"):
        G, A, B = _problem(3, 12, 16, 4, case=case, dtype=torch.float64)
        c = calibrate(gram_products(A, B, G @ B, G.T @ A))
        alpha, beta, _ = _solve(G, A, B, c=float(c), method="scalar")
        torch.testing.assert_close(torch.cat([alpha, beta]), torch.ones(8, dtype=torch.float64))
    assert calibrate(gram_products(A, B, G @ B * 0, G.T @ A * 0)).isnan()


def test_theorem_3_closed_form():
    """α² = c·C_A/D, β² = c·C_B/D where both are positive, as printed in the paper."""
    G, A, B = _problem(5, 14, 12, 3, dtype=torch.float64)
    g_A, g_B = G @ B, G.T @ A
    p_A, p_B = (A @ g_B.T).square().sum(), (g_A @ B.T).square().sum()
    x, n_A, n_B = ((A @ g_B.T) * (g_A @ B.T)).sum(), g_A.square().sum(), g_B.square().sum()
    D, C_A, C_B = p_A * p_B - x**2, n_B * p_B - n_A * x, n_A * p_A - n_B * x
    assert C_A > 0
    assert C_B > 0
    alpha, beta, _ = optimal_scaling(A, B, g_A, g_B, c=2.0, method="scalar")
    torch.testing.assert_close(alpha.square(), (2 * C_A / D).expand(3))
    torch.testing.assert_close(beta.square(), (2 * C_B / D).expand(3))


def test_a_lowered_matmul_precision_does_not_blur_the_products():
    G, A, B = _problem(1, 256, 256, 4)
    sharp = gram_products(A, B, G @ B, G.T @ A)
    g_A, g_B = G @ B, G.T @ A
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            blurred = gram_products(A, B, g_A, g_B)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for one, other in zip(sharp[:5], blurred[:5], strict=True):
        assert torch.equal(one, other)


def test_product_norm_is_that_of_the_dense_product():
    G, A, B = _problem(2, 15, 9, 4, dtype=torch.float64)
    d = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(product_norm(gram_products(A, B, G @ B, G.T @ A), d), (A * d @ B.T).norm())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "papre"}, "papre"),
        ({"A": torch.zeros(5, 2)}, r"\(5, 2\)"),
        ({"grad_B": torch.zeros(4, 3)}, r"\(4, 3\)"),
    ],
)
def test_bad_arguments_are_named(change, words):
    arguments = {"A": torch.ones(6, 3), "B": torch.ones(5, 3), "grad_A": torch.ones(6, 3), "grad_B": torch.ones(5, 3)}
    unchecked = getattr(optimal_scaling, "__wrapped__", optimal_scaling)
    with pytest.raises(Exception, match=words):
        unchecked(**{**arguments, "c": 1.0, **change})
