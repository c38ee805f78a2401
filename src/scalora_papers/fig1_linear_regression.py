"""Fig. 1 of ScaLoRA (arXiv 2510.23818): linear regression by plain gradient descent, where everything can be seen.

min over W of ℓ(W) = ½‖XW − Y‖²_F with Gaussian X, Y, from W = 0. L = ‖X‖²₂ is known exactly, so c = 1/(Lη) is too.
All learning rates and seeds of a method are one batch: tensors are (rates, seeds, …), float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from scalora.algebra.lowrank import numerical_rank
from scalora.algebra.scaling import ScalingMethod, optimal_scaling

from .base import Experiment, Outcome, Setting, TextTable

Adapters = tuple[Tensor, Tensor]
Choice = Callable[[Tensor, Tensor, Tensor, Tensor], Adapters]  # G (…, m, n), A (…, m, r), B (…, n, r), c (…) → Ã, B̃


@dataclass(frozen=True)
class Gaussian:
    """X, Y (seeds, n, n), the first B (seeds, n, r) as PEFT draws it, and L (seeds)."""

    X: Tensor
    Y: Tensor
    B: Tensor
    L: Tensor


@dataclass(frozen=True)
class Curves:
    """What is measured of a method, each (steps + 1, rates, seeds), or (steps, …) where it belongs to W_t → W_t+1."""

    rates: tuple[float, ...]  # η; 0 stands for full fine-tuning with step 1/L
    loss: Tensor
    rank: Tensor  # of W_t − W_0; NaN at steps where it was not asked for
    alignment: Tensor  # cosine of Δ = W_t+1 − W_t with −G
    bound: Tensor  # ℓ(W_t) + ⟨G, Δ⟩ + (L/2)‖Δ‖², which ℓ(W_t+1) never exceeds

    @property
    def final(self) -> Tensor:
        """Loss after the last step (rates, seeds); infinite where a run diverged, i.e. ended above its beginning."""
        return self.loss[-1].where(self.loss[-1] <= self.loss[0], torch.inf)  # NaN compares as False

    @property
    def best(self) -> int:
        """Index of the rate with the least mean final loss."""
        return int(self.final.mean(1).argmin())


def draw_problem(n: int, r: int, seeds: int) -> Gaussian:
    """The problems of seeds 0, 1, …"""
    drawn = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        X, Y = (torch.randn(n, n, generator=generator, dtype=torch.float64) for _ in range(2))
        drawn.append((X, Y, (2 * torch.rand(n, r, generator=generator, dtype=torch.float64) - 1) / n**0.5))
    X, Y, B = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    return Gaussian(X, Y, B, torch.linalg.matrix_norm(X, 2) ** 2)


def keep(G: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Adapters:
    """Plain LoRA."""
    return A, B


def rescale(G: Tensor, A: Tensor, B: Tensor, c: Tensor, *, method: ScalingMethod) -> Adapters:
    """An event of ScaLoRA, by the library's own solver."""
    alpha, beta, _ = optimal_scaling(A, B, G @ B, G.mT @ A, c=c, method=method)
    return A * alpha[..., None, :], B * beta[..., None, :]


def oracle(G: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Adapters:
    """Theorem 1: of the top 2r singular directions of G, A gets the 1st, 3rd, … and B the others."""
    r = A.shape[-1]
    U, _, Vt = torch.linalg.svd(G.nan_to_num(0, 0, 0), full_matrices=False)  # LAPACK refuses what has diverged
    root = c.sqrt()[..., None, None]
    return root * U[..., 0 : 2 * r : 2], root * Vt[..., 1 : 2 * r : 2, :].mT


METHODS: dict[str, Choice | None] = {
    "LoRA": keep,
    "ScaLoRA": partial(rescale, method="paper"),
    "scalar-only": partial(rescale, method="scalar"),
    "non-negative": partial(rescale, method="nonnegative"),
    "oracle": oracle,
    "full": None,  # W ← W − G/L, the least of the bound at every step
}


def descend(task: Gaussian, choose: Choice | None, rates: Sequence[float], steps: int, ranked: Sequence[int]) -> Curves:
    """Gradient descent on A and B, each step after an event (I = 1); without ``choose`` on W, with step 1/L.

    An event leaves W = W_pt + A Bᵀ as it is. So W alone is carried along, and what an event moves is never formed.

    Args:
        task: the problems, one per seed.
        choose: gives the adapters of the coming step.
        rates: η.
        steps: how many.
        ranked: the steps before which the rank of W is measured.
    """
    X, Y, L = task.X, task.Y, task.L
    rates = rates if choose else [0.0]
    eta = torch.tensor(rates, dtype=Y.dtype)[:, None]
    W = torch.zeros(len(eta), *Y.shape, dtype=Y.dtype)
    A, B = torch.zeros(*W.shape[:-1], task.B.shape[-1], dtype=Y.dtype), task.B.expand(len(eta), -1, -1, -1)
    losses, ranks, alignments, bounds = [], [], [], []
    for t in range(steps + 1):
        residual = X @ W - Y
        loss = 0.5 * residual.square().sum((-2, -1))
        losses.append(loss)
        ranks.append(_rank(W) if t in ranked else torch.full_like(loss, torch.nan))
        if t == steps:
            break
        G = X.mT @ residual
        if choose:
            A, B = choose(G, A, B, 1 / (L * eta))
            before, step = A @ B.mT, eta[..., None, None]
            A, B = A - step * G @ B, B - step * G.mT @ A
            delta = A @ B.mT - before
        else:
            delta = -G / L[:, None, None]
        slope, length = (G * delta).sum((-2, -1)), delta.square().sum((-2, -1))
        alignments.append(-slope / (length.sqrt() * torch.linalg.matrix_norm(G)))
        bounds.append(loss + slope + L / 2 * length)
        W = W + delta
    return Curves(tuple(rates), *(torch.stack(rows) for rows in (losses, ranks, alignments, bounds)))


class LinearRegression(Experiment):
    """Loss, rank, alignment and bound of six methods, over learning rates and seeds."""

    name = "fig1"
    summary = "ScaLoRA's Fig. 1: linear regression, where ScaLoRA's update becomes high-rank and LoRA's does not"
    n, r, steps = 64, 8, 300
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2)
    seeds = {"small": 3, "paper": 10}

    def run(self, setting: Setting) -> Outcome:
        task = draw_problem(self.n, self.r, self.seeds[setting.scale])
        shown = [t for t in range(self.steps + 1) if t <= 20 or t % 10 == 0]
        found: dict[str, Curves] = {}
        for method, choose in METHODS.items():
            found[method] = descend(task, choose, self.rates, self.steps, shown)
            setting.log(f"{method}: final loss {_mean(found[method].final[found[method].best])}")
        content = {
            "problem": {"m": self.n, "n": self.n, "r": self.r, "steps": self.steps, "L": task.L.tolist()},
            "curves_at_steps": shown,
            "runs": [run for method, curves in found.items() for run in _content(method, curves, shown)],
        }
        figures = {"fig1": _four_panels(found, shown, self.r), "rates": _over_rates(found)}
        return Outcome(content, [_table(found)], figures, _remarks(found, self.r))


# At seed 0, from the trials that chose these settings; the paper prints no number.
_KNOWN = {("LoRA", 1e-3): "near 1300", ("LoRA", 3e-3): "near 1300", ("LoRA", 1e-2): "diverges"}
_KNOWN |= {("ScaLoRA", 1e-2): "about 190", ("full", 0): "122"}
_STYLES: dict[str, dict[str, Any]] = {
    "LoRA": {"color": "#bc4749"},
    "ScaLoRA": {"color": "#2a6f97", "linewidth": 3, "alpha": 0.6},  # the next two lie on it
    "scalar-only": {"color": "#e09f3e", "linestyle": "--"},
    "non-negative": {"color": "#52796f", "linestyle": ":"},
    "oracle": {"color": "#9a6fb0"},
    "full": {"color": "#333333"},
}


def _rank(W: Tensor) -> Tensor:
    rank = numerical_rank(torch.linalg.svdvals(W.nan_to_num(0, 0, 0)), *W.shape[-2:]).double()
    return rank.where(W.isfinite().all((-2, -1)), torch.nan)


def _rate(rate: float) -> str:
    return f"{rate:g}" if rate else "1/L"


def _mean(final: Tensor) -> str:
    """Mean ± standard error over the seeds that did not diverge, and how many did."""
    alive = final[final.isfinite()]
    value = f"{alive.mean():.1f}" if len(alive) else ""
    error = f" ± {alive.std() / len(alive) ** 0.5:.1f}" if len(alive) > 1 else ""
    dead = f" (diverged: {len(final) - len(alive)} of {len(final)})" if len(alive) < len(final) else ""
    return (value + error + dead).strip()


def _numbers(values: Tensor) -> list[float | None]:
    """Five digits; None for what is not finite, which JSON cannot hold."""
    return [float(f"{value:.5g}") if abs(value) < float("inf") else None for value in values.tolist()]


def _content(method: str, curves: Curves, shown: list[int]) -> list[dict[str, Any]]:
    error, within = curves.loss.std(-1) / curves.loss.shape[-1] ** 0.5, shown[:-1]  # no step comes after the last W
    return [
        {
            "method": method,
            "eta": rate or "1/L",
            "final_loss_by_seed": _numbers(curves.final[i]),
            "diverged_seeds": curves.final[i].isinf().nonzero()[:, 0].tolist(),
            "loss": _numbers(curves.loss[shown, i].mean(-1)),
            "loss_standard_error": _numbers(error[shown, i]),
            "rank": _numbers(curves.rank[shown, i].mean(-1)),
            "alignment": _numbers(curves.alignment[within, i].mean(-1)),
            "bound": _numbers(curves.bound[within, i].mean(-1)),
        }
        for i, rate in enumerate(curves.rates)
    ]


def _table(found: dict[str, Curves]) -> TextTable:
    rows = [
        [method, _rate(rate), _mean(final), _mean(final[:1]), _KNOWN.get((method, rate), "")]
        for method, curves in found.items()
        for rate, final in zip(curves.rates, curves.final, strict=True)
    ]
    loss = found["full"].loss
    title = f"Loss after {len(loss) - 1} steps, from {loss[0].mean():.0f} (at seed 0: {loss[0, 0, 0]:.0f})"
    columns = ["method", "η", f"mean ± standard error of {loss.shape[-1]} seeds", "seed 0", "seed 0, known before"]
    return TextTable(title, columns, rows)


def _remarks(found: dict[str, Curves], r: int) -> list[str]:
    best = {name: c.best for name, c in found.items()}
    rate = {name: _rate(c.rates[best[name]]) for name, c in found.items()}
    least = {name: float(c.final[best[name]].mean()) for name, c in found.items()}
    closed = (least["LoRA"] - least["ScaLoRA"]) / (least["LoRA"] - least["full"])
    pairs = zip(found["LoRA"].rates, found["LoRA"].final.mean(1), found["ScaLoRA"].final.mean(1), strict=True)
    lost = [f"{_rate(eta)} ({ours:.0f} to {lora:.0f})" for eta, lora, ours in pairs if ours > lora]
    slack = torch.cat([(c.bound - c.loss[1:]).flatten() / c.loss[0].mean() for c in found.values()])
    slack = slack[slack.isfinite()]
    return [
        f"Each at its best η, ScaLoRA closes {closed:.0%} of LoRA's distance to full gradient descent; final losses: "
        + ", ".join(f"{name} {least[name]:.0f} (η = {rate[name]})" for name in sorted(least, key=least.__getitem__)),
        f"ScaLoRA ends above LoRA at η = {', '.join(lost) or 'none of those tried'}",
        f"Mean rank of the cumulative update at the end (r = {r}), at the best η: "
        + ", ".join(f"{name} {float(c.rank[-1, best[name]].mean()):.0f}" for name, c in found.items()),
        "Alignment with −G, mean over all steps at the best η: "
        + ", ".join(f"{name} {float(c.alignment[:, best[name]].mean()):.2f}" for name, c in found.items()),
        f"The loss exceeds its quadratic bound in {int((slack < -1e-9).sum())} of {len(slack)} finite steps",
    ]


def _four_panels(found: dict[str, Curves], shown: list[int], r: int) -> Figure:
    """Means over seeds at each method's best η, and LoRA's loss at ScaLoRA's."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    loss, rank, alignment, bound = figure.subplots(2, 2).flat
    for name, c in found.items():
        style = _STYLES[name]
        loss.plot(c.loss[:, c.best].mean(-1), label=f"{name}, η = {_rate(c.rates[c.best])}", **style)
        rank.plot(shown[1:], c.rank[shown[1:], c.best].mean(-1), **style)
        alignment.plot(range(1, len(c.loss)), c.alignment[:, c.best].mean(-1), **style)
        if name in ("LoRA", "ScaLoRA", "oracle", "full"):
            bound.plot(range(1, 16), c.loss[1:16, c.best].mean(-1), color=style["color"])
            bound.plot(range(1, 16), c.bound[:15, c.best].mean(-1), "--", color=style["color"])
    lora, full, best = found["LoRA"], found["full"], found["ScaLoRA"].best
    label = f"LoRA, η = {_rate(lora.rates[best])}" + (" (diverges)" if lora.final[best].isinf().any() else "")
    loss.plot(lora.loss[:, best].mean(-1), ":", color=_STYLES["LoRA"]["color"], label=label)
    limits = 0.8 * float(full.loss.mean(-1).min()), 2 * float(full.loss[0].mean())
    loss.set(yscale="log", ylim=limits, xlabel="step", ylabel="loss", title="loss")
    rank.axhline(r, color="grey", linestyle=":", linewidth=1)
    rank.set(xscale="log", ylim=(0, None), xlabel="step", ylabel="rank", title="rank of the cumulative update")
    alignment.set(xscale="log", xlabel="step", ylabel="cosine of ΔW and −G", title="alignment with the full gradient")
    bound.plot([], [], color="grey", label="loss after the step")
    bound.plot([], [], "--", color="grey", label="its quadratic bound")
    bound.set(xlabel="step", ylabel="loss", title="loss and its bound, first steps")
    bound.legend(frameon=False)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _over_rates(found: dict[str, Curves]) -> Figure:
    """Mean final loss over η, a dot per seed; a cross above for every η at which a seed diverged."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axis = figure.subplots()
    top = float(found["full"].loss[0].mean())
    for name, c in found.items():
        if c.rates == (0,):
            axis.axhline(float(c.final.mean()), **_STYLES[name], label=f"{name}, step 1/L")
            continue
        axis.plot(c.rates, c.final.mean(1), **_STYLES[name], label=name)
        axis.plot(c.rates, c.final, ".", color=_STYLES[name]["color"])
        top *= 1.3
        for rate, dead in zip(c.rates, c.final.isinf().sum(1).tolist(), strict=True):
            if dead:
                axis.annotate(f"× {dead}", (rate, top), color=_STYLES[name]["color"], ha="center", va="center")
    axis.set(
        xscale="log", yscale="log", ylim=(None, 1.3 * top), xlabel="η", ylabel="final loss (× seeds that diverged)"
    )
    figure.legend(loc="outside right upper", frameon=False)
    return figure


EXPERIMENTS = (LinearRegression,)
