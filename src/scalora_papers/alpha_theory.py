"""α-LoRA's theory (arXiv 2510.21345): test accuracy over α by formula and by Monte Carlo, and the best α.

Source: x = yμ + z, N samples; target: x = yμ_β + z, n samples; z ~ N(0, I_p), y = ±1, μ_β = βμ + √(1−β²)·μ⊥ of the
same length as μ, so that β is the cosine between both tasks. The source classifier w̃ is a ridge regression, and so is
what the target adds to it:

    w̃ = (XXᵀ/N + γ̃I)⁻¹ Xy/N        w_α = α w̃ + a,   a = Q (1/n)(Xy − α XXᵀw̃),   Q = (XXᵀ/n + γI)⁻¹

As QXXᵀ/n = I − γQ, w_α = αγ Qw̃ + Q Xy/n, and a given w_α is right with probability Φ(⟨w_α,μ_β⟩ / ‖w_α‖). For large p
and n both are nearly constant; their limits come from the deterministic equivalent of Q,

    Q̄ = ((I + μ_β μ_βᵀ)/(1+δ) + γI)⁻¹ = (1+δ)/κ · (I − μ_β μ_βᵀ/λ),   κ = 1 + γ(1+δ),   λ = ‖μ_β‖² + κ,

where δ = tr(Q̄)/n solves δκ = η(1+δ), η = p/n. Leaving one sample out gives Q Xy/n ≈ μ_β/λ and
yᵀXᵀQXy/n² ≈ (‖μ_β‖²+η)/λ. What holds a Q² is −d/dγ of the same with one Q, and dκ/dγ = 1/(1−h) with h = η/κ².
The tests hold all this equal to a dense twin and to Monte Carlo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .base import Experiment, Outcome, Setting, TextTable


@dataclass(frozen=True)
class Target:
    """All that the theory needs to know: ‖μ_β‖², η = p/n, γ, and of the source ⟨w̃,μ_β⟩ and ‖w̃‖²."""

    mu2: float
    eta: float
    gamma: float
    c: float = 0.0
    w2: float = 0.0

    @property
    def delta(self) -> float:
        """δ = tr(Q̄)/n, the positive root of γδ² + (1+γ−η)δ − η = 0."""
        b = self.eta - self.gamma - 1
        return (b + sqrt(b**2 + 4 * self.eta * self.gamma)) / (2 * self.gamma)

    @property
    def kappa(self) -> float:
        """κ = 1 + γ(1+δ)."""
        return 1 + self.gamma * (1 + self.delta)


def limits(target: Target, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Limits of ⟨w_α,μ_β⟩ and ‖w_α‖²: mean and variance of the decision statistic y⟨w_α,x⟩; α of any shape."""
    kappa, lam = target.kappa, target.mu2 + target.kappa
    g = kappa - 1  # γ(1+δ)
    mean = (alpha * g * target.c + target.mu2) / lam
    squares = (g / kappa) ** 2 * (lam**2 * target.w2 - (lam + kappa - target.eta) * target.c**2)
    variance = alpha**2 * squares + 2 * alpha * target.gamma * target.c + target.mu2 + target.eta
    return mean, variance / (lam**2 * (1 - target.eta / kappa**2))


def accuracy(target: Target, alpha: Tensor) -> Tensor:
    """Test accuracy Φ(mean/√variance) in the limit; α of any shape."""
    mean, variance = limits(target, alpha)
    return torch.special.ndtr(mean / variance.sqrt())


def alpha_star(target: Target) -> float:
    """The α of the greatest accuracy, the paper's closed form."""
    g, lam = target.kappa - 1, target.mu2 + target.kappa
    gap = lam * target.mu2 * target.w2 - (lam - target.eta) * target.c**2
    return target.eta * target.kappa * target.c / (g * gap)


def alpha_by_scan(target: Target, reach: float = 100.0, points: int = 2001, rounds: int = 6) -> float:
    """The same by maximising the curve: a grid over [−reach, reach], refined about its best point."""
    low, high = -reach, reach
    for _ in range(rounds):
        grid = torch.linspace(low, high, points, dtype=torch.float64)
        mean, variance = limits(target, grid)
        best = int((mean / variance.sqrt()).argmax())  # Φ is increasing; without it there is more resolution
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, points - 1)])
    return (low + high) / 2


@dataclass(frozen=True)
class Transfer:
    """A source and a target: sizes, ‖μ‖ and the cosine β between the tasks."""

    p: int
    N: int
    n: int
    beta: float
    mu: float = 1.5
    gamma: float = 1.0
    gamma_source: float = 1.0

    def target(self) -> Target:
        """The theory's view. The source is the same theory at α = 0: w̃ is a w_0 of N samples about μ."""
        source = Target(self.mu**2, self.p / self.N, self.gamma_source)
        along, w2 = (float(limit) for limit in limits(source, torch.zeros((), dtype=torch.float64)))
        return Target(self.mu**2, self.p / self.n, self.gamma, self.beta * along, w2)


def samples(mu: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """X (p, n) and y (n,) of x = yμ + z; both labels occur equally often."""
    y = torch.ones(n, dtype=mu.dtype)
    y[: n // 2] = -1
    return torch.outer(mu, y) + torch.randn(len(mu), n, dtype=mu.dtype, generator=generator), y


def ridge(X: Tensor, rhs: Tensor, gamma: float) -> Tensor:
    """(XXᵀ/n + γI)⁻¹ rhs; X (p, n), rhs (p, k)."""
    S = X @ X.T / X.shape[1] + gamma * torch.eye(len(X), dtype=X.dtype)
    return torch.cholesky_solve(rhs, torch.linalg.cholesky(S))


def simulate(task: Transfer, alphas: Tensor, draws: int, seed: int) -> Tensor:
    """Accuracy (draws, k) at k values of α: w_α by its definition, the test error integrated exactly."""
    generator = torch.Generator().manual_seed(seed)
    mu, mu_beta = torch.zeros(2, task.p, dtype=torch.float64)
    mu[0] = task.mu  # N(0, I) knows no directions, so any two will do
    mu_beta[0], mu_beta[1] = task.beta * task.mu, sqrt(1 - task.beta**2) * task.mu
    found = []
    for _ in range(draws):
        X, y = samples(mu, task.N, generator)
        w = ridge(X, (X @ y / task.N)[:, None], task.gamma_source)[:, 0]
        X, y = samples(mu_beta, task.n, generator)
        own, correction = ridge(X, torch.stack([X @ y, X @ (X.T @ w)], 1) / task.n, task.gamma).T
        w_alpha = own + alphas[:, None] * (w - correction)
        found.append(torch.special.ndtr(w_alpha @ mu_beta / w_alpha.norm(dim=1)))
    return torch.stack(found)


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and its standard error over the first dimension (draws)."""
    return values.mean(0), values.std(0) / sqrt(len(values))


def best_of_draws(alphas: Tensor, found: Tensor, resamples: int = 200) -> tuple[float, float]:
    """The α of the greatest mean accuracy over draws (draws, k), and its bootstrap standard error."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(found), (resamples, len(found)), generator=generator)
    again = torch.stack([alphas[found[pick].mean(0).argmax()] for pick in picks])
    return float(alphas[found.mean(0).argmax()]), float(again.std())


class AlphaTheory(Experiment):
    name: ClassVar[str] = "alpha-theory"
    summary: ClassVar[str] = "α-LoRA's theory: accuracy over α by formula and by Monte Carlo, and the best α"

    def run(self, setting: Setting) -> Outcome:
        small = setting.scale == "small"
        p, N, draws = (200, 1000, 100) if small else (400, 2000, 1000)
        sizes = (p // 10, p // 2, 2 * p)  # p = 400, n = 40, N = 2000 are the paper's on Amazon reviews
        betas = (0.0, 0.3, 0.6, 0.9) if small else (-0.5, 0.0, 0.3, 0.6, 0.9, 1.0)
        cases, like = [], Transfer(p, N, p, 0)
        for n in sizes:
            for beta in betas:
                setting.log(f"n = {n} (η = {p / n:g}), β = {beta:g}: {draws} draws")
                cases.append(measure_panel(Transfer(p, N, n, beta), draws, seed=len(cases)))
        return Outcome(
            {"p": p, "N": N, "draws": draws, "mu": like.mu, "gamma": like.gamma, "cases": cases},
            _tables(cases, draws),
            {"accuracy": _panels(cases, sizes, betas), "best-alpha": _best(cases, like, sizes)},
            _remarks(cases),
        )


def measure_panel(task: Transfer, draws: int, seed: int) -> dict[str, Any]:
    """One panel: curves by theory and Monte Carlo, α* in three ways, and gains over α = 1 and α = 0 (paired)."""
    target = task.target()
    best = alpha_star(target)
    reach = max(2.5, 2.2 * abs(best))
    grid = torch.linspace(-reach if best < 0 else -reach / 4, reach, 301, dtype=torch.float64)
    alphas = torch.cat([grid, torch.tensor([best, 0.0, 1.0], dtype=torch.float64)])
    found = simulate(task, alphas, draws, seed)
    mean, error = mean_and_error(found)
    theory = accuracy(target, alphas)
    best_drawn, best_error = best_of_draws(grid, found[:, :-3])
    gains = {}
    for name, column in (("0", -2), ("1", -1)):
        gain, gain_error = mean_and_error(found[:, -3] - found[:, column])
        theirs = float(theory[-3] - theory[column])
        gains[name] = {"theory": theirs, "mean": float(gain), "error": float(gain_error)}
    return {
        "n": task.n, "eta": target.eta, "beta": task.beta, "inner": target.c, "w2": target.w2,
        "alpha_formula": best, "alpha_scan": alpha_by_scan(target), "alpha_drawn": best_drawn,
        "alpha_drawn_error": best_error, "gains": gains,
        "at_best": {"theory": float(theory[-3]), "mean": float(mean[-3]), "error": float(error[-3])},
        "alphas": grid[::15].tolist(), "step": float(grid[1] - grid[0]),
        "line": {"alphas": grid[::5].tolist(), "theory": theory[:-3:5].tolist()}, "theory": theory[:-3:15].tolist(),
        "mean": mean[:-3:15].tolist(), "error": error[:-3:15].tolist(),
    }  # fmt: skip


def _tables(cases: Sequence[dict[str, Any]], draws: int) -> list[TextTable]:
    best, gains = [], []
    for case in cases:
        where = [f"{case['eta']:g}", f"{case['beta']:g}"]
        best.append([*where, f"{case['alpha_formula']:.3f}", f"{round(case['alpha_scan'], 3) + 0:.3f}"])
        best[-1] += [f"{round(case['alpha_drawn'], 2) + 0:.2f} ± {case['alpha_drawn_error']:.2f}"]
        found = (case["at_best"], case["gains"]["1"], case["gains"]["0"])
        gains.append([*where, *(f"{_percent(each)} ({100 * each['theory']:.2f})" for each in found)])
    drawn = f"over {draws} draws"
    return [
        TextTable(
            f"Best α: closed form, maximum of the theory's curve, maximum of the mean {drawn} ± bootstrap error",
            ["η = p/n", "β", "closed form", "scan of theory", "Monte Carlo"],
            best,
        ),
        TextTable(
            f"Accuracy at α* and its gains, %: mean ± standard error {drawn}, gains paired (in brackets: theory)",
            ["η = p/n", "β", "accuracy at α*", "gain over α = 1", "gain over α = 0"],
            gains,
        ),
    ]


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.2f} ± {100 * value['error']:.2f}"


def _remarks(cases: Sequence[dict[str, Any]]) -> list[str]:
    formula = max(abs(case["alpha_formula"] - case["alpha_scan"]) for case in cases)
    points = [
        (100 * (m - t), (m - t) / e, case)
        for case in cases
        for m, t, e in zip(case["mean"], case["theory"], case["error"], strict=True)
    ]
    close = sum(abs(z) <= 3 for _, z, _ in points) / len(points)
    off, _, worst = max(points, key=lambda point: abs(point[0]))
    ordered = sorted(cases, key=lambda case: case["gains"]["1"]["theory"])
    least, most = (
        f"{100 * case['gains']['1']['theory']:.2f} (η = {case['eta']:g}, β = {case['beta']:g}, α* = "
        f"{case['alpha_formula']:.2f})"
        for case in (ordered[0], ordered[-1])
    )
    agree = sum(abs(c["alpha_drawn"] - c["alpha_formula"]) <= 3 * c["alpha_drawn_error"] + c["step"] for c in cases)
    return [
        f"the published closed form of α* {'is' if formula < 1e-4 else 'is NOT'} where the theory's curve is greatest "
        f"(they differ by at most {formula:.0e})",
        f"theory and Monte Carlo: {close:.0%} of {len(points)} points within 3 standard errors; the greatest "
        f"difference is {off:+.2f} points of accuracy, at η = {worst['eta']:g}, β = {worst['beta']:g}",
        f"α* by Monte Carlo agrees with the closed form within 3 bootstrap errors and a grid step in {agree} of "
        f"{len(cases)} cases",
        f"by theory, α* gains between {least} and {most} points over α = 1",
    ]


def _panels(cases: Sequence[dict[str, Any]], sizes: Sequence[int], betas: Sequence[float]) -> Figure:
    figure = Figure(figsize=(2.9 * len(betas), 2.5 * len(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), len(betas), squeeze=False, sharey="row")
    for case in cases:
        axis = axes[sizes.index(case["n"])][betas.index(case["beta"])]
        line = case["line"]
        axis.plot(line["alphas"], [100 * a for a in line["theory"]], color="#2a6f97", label="theory")
        axis.errorbar(
            case["alphas"], [100 * a for a in case["mean"]], yerr=[100 * e for e in case["error"]],
            fmt="o", markersize=3, capsize=2, elinewidth=0.8, color="#e09f3e", label="Monte Carlo ± standard error",
        )  # fmt: skip
        axis.axvline(case["alpha_formula"], color="#bc4749", linestyle="--", linewidth=1, label="α*, closed form")
        axis.axvline(1, color="grey", linestyle=":", linewidth=1, label="α = 1")
        axis.set_title(f"β = {case['beta']:g}, η = {case['eta']:g}: α* = {case['alpha_formula']:.2f}", fontsize=9)
        axis.grid(alpha=0.25)
    figure.supxlabel("α", fontsize=10)
    figure.supylabel("test accuracy, %", fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _best(cases: Sequence[dict[str, Any]], like: Transfer, sizes: Sequence[int]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    betas = torch.linspace(min(case["beta"] for case in cases), 1, 81).tolist()
    for n, colour in zip(sizes, ("#2a6f97", "#e09f3e", "#52796f"), strict=True):
        targets = [Transfer(like.p, like.N, n, beta).target() for beta in betas]
        label, mine = f"η = {like.p / n:g}", [case for case in cases if case["n"] == n]
        left.plot(betas, [alpha_star(target) for target in targets], color=colour, label=label)
        at = [accuracy(target, torch.tensor([alpha_star(target), 1.0], dtype=torch.float64)) for target in targets]
        right.plot(betas, [100 * float(a[0] - a[1]) for a in at], color=colour, label=label)
        drawn = [(case["beta"], case["alpha_drawn"], case["alpha_drawn_error"]) for case in mine]
        gains = [(case["beta"], 100 * case["gains"]["1"]["mean"], 100 * case["gains"]["1"]["error"]) for case in mine]
        for axis, points in ((left, drawn), (right, gains)):
            x, y, error = zip(*points, strict=True)
            axis.errorbar(x, y, yerr=error, fmt="o", markersize=4, capsize=2, color=colour)
    left.set(xlabel="β (cosine between the tasks)", ylabel="best α", title="lines: closed form, points: Monte Carlo")
    right.set(xlabel="β (cosine between the tasks)", ylabel="gain over α = 1, points", title="what α* gains over α = 1")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    return figure


EXPERIMENTS = (AlphaTheory,)
