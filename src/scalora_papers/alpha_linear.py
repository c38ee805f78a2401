"""α-LoRA's linear experiment (arXiv 2510.21345) on other texts: from N labelled source texts to n of the target.

The paper transfers between domains of Amazon reviews. Here: headlines (sarcastic or not) between topics and lengths,
and with a data folder SST-2 between lengths and to and from headlines, and MRPC to and from RTE. A text is a tf-idf
vector over p words, a pair of texts the distance |φ₁ − φ₂| of theirs. What the theory needs (x = yμ_β + z,
z ~ N(0, I_p)) is approached by balanced classes and by features centred within each domain and of variance 1 over both.
Words, centres and variances come from the training texts of both domains, without labels.

The best α by the theory needs ⟨w̃,μ_β⟩ and ‖μ_β‖², which are estimated from the n target samples, see `estimate`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from math import ceil
from statistics import median
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from scalora.common.errors import ScaloraError
from scalora.tasks.data.rows import DataSpec, Row, load_splits

from .alpha_theory import Target, alpha_star, mean_and_error, ridge
from .base import Experiment, Outcome, Setting, TextTable

Labelled = list[tuple[tuple[str, ...], int]]  # one text or a pair of texts, and y = ±1

PUBLISHED = {"Amazon dvd → book": (75.22, 77.59), "Amazon elec → kitchen": (81.58, 83.02)}  # at α = 1 and at α*
ONE, STAR, LEFT_OUT, KNOWN, ALONE = "α = 1", "α* estimated", "leave-one-out", "oracle: α*, μ_β known", "w̃ alone"
# How α is chosen (an oracle looks at labels that a user does not have), with its mark in the figure.
MARKS = {
    "α = 0": ("s", "#888888"), ONE: ("D", "#333333"), STAR: ("o", "#bc4749"), LEFT_OUT: ("^", "#52796f"),
    KNOWN: ("P", "#9a6fb0"), "oracle: best on test": ("*", "#e09f3e"),
}  # fmt: skip
WAYS = (*MARKS, ALONE)
_POLITICS = re.compile(
    r"\b(trump|obama|clinton|bush|romney|sanders|cruz|president|presidential|senat\w+|congress\w*|gop|republicans?|"
    r"democrat\w*|elections?|campaign|white house|voters?|votes?|politic\w*|governors?|supreme court|bill|government)\b"
)


@dataclass(frozen=True)
class Sizes:
    N: int = 2000  # source samples
    n: int = 40  # target samples
    p: int = 400
    draws: int = 50
    pool: int = 5000  # at most, training texts a domain from which the draws are made
    test: int = 2000
    gamma: float = 1.0  # of source and target


@dataclass(frozen=True)
class Domain:
    """Labelled texts to draw training samples from, and others to test on."""

    train: Labelled
    test: Labelled

    def split(self, holds: Callable[[str], bool]) -> tuple[Domain, Domain]:
        """Those whose (first) text is such, and the others."""
        both = [[[e for e in part if holds(e[0][0]) == k] for part in (self.train, self.test)] for k in (True, False)]
        return Domain(*both[0]), Domain(*both[1])


def headlines() -> Domain:
    """The packaged headlines; y = 1 is sarcastic."""
    return _domain(DataSpec(train="sarcasm", test_size=8000), ["label", "headline"])


def glue(setting: Setting, task: str, columns: dict[str, str]) -> Domain:
    """A GLUE task of the data folder; ``columns`` maps label, text and perhaps second to names in its files."""
    train, test = (str(setting.file(f"glue/{task}/{name}.tsv").resolve()) for name in ("train", "dev"))
    return _domain(DataSpec(train=train, test=test, columns=columns), list(columns))


def _domain(spec: DataSpec, columns: Sequence[str]) -> Domain:
    def labelled(rows: Sequence[Row]) -> Labelled:
        signs = (1 if str(row["label"]) in ("1", "entailment") else -1 for row in rows)
        return [(tuple(row[c] for c in columns if c != "label"), y) for row, y in zip(rows, signs, strict=True)]

    splits = load_splits(spec, columns)
    return Domain(labelled(splits.train), labelled(splits.test))


def pairs_of(setting: Setting) -> dict[str, tuple[Domain, Domain]]:
    """Source and target by name."""
    news = headlines()
    politics, rest = news.split(lambda text: bool(_POLITICS.search(text)))
    long, short = news.split(lambda text: len(text.split()) >= 10)
    pairs = {"headlines: other → politics": (rest, politics), "headlines: politics → other": (politics, rest)}
    pairs |= {"headlines: short → long": (short, long), "headlines: long → short": (long, short)}
    if setting.data is None:  # SST-2, MRPC and RTE are not packaged
        return pairs
    sst2 = glue(setting, "SST-2", {"label": "label", "text": "sentence"})
    mrpc = glue(setting, "MRPC", {"label": "Quality", "text": "#1 String", "second": "#2 String"})
    rte = glue(setting, "RTE", {"label": "label", "text": "sentence1", "second": "sentence2"})
    long, short = sst2.split(lambda text: len(text.split()) >= 15)
    pairs |= {"SST-2: short → long": (short, long), "SST-2: long → short": (long, short)}
    pairs |= {"SST-2 → headlines": (sst2, news), "headlines → SST-2": (news, sst2)}
    return pairs | {"MRPC → RTE": (mrpc, rte), "RTE → MRPC": (rte, mrpc)}


def balanced(part: Labelled, size: int, what: str, least: int, seed: int = 0) -> Labelled:
    """At most ``size`` of them, as many of either class; raises ScaloraError where fewer than ``least`` can be had."""
    rows = [[row for row in random.Random(seed).sample(part, len(part)) if row[1] == sign] for sign in (1, -1)]
    each = min(size // 2, *map(len, rows))
    if 2 * each < least:
        raise ScaloraError(f"{what}: only {each} texts of the rarer class, {ceil(least / 2)} are needed; add texts")
    return rows[0][:each] + rows[1][:each]


def features(source: Labelled, target: Labelled, test: Labelled, p: int) -> list[tuple[Tensor, Tensor]]:
    """X (p, number of texts) and y of all three; labels of no one are looked at."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ScaloraError("alpha-linear needs scikit-learn: pip install 'scalora[arena]'") from error
    words = TfidfVectorizer(max_features=p, sublinear_tf=True)
    words.fit(chain.from_iterable(texts for texts, _ in (*source, *target)))

    def vectors(part: Labelled) -> Tensor:
        each = [words.transform([texts[i] for texts, _ in part]).toarray() for i in range(len(part[0][0]))]
        return torch.from_numpy(each[0] if len(each) == 1 else abs(each[0] - each[1])).T

    X_source, X_target, X_test = (vectors(part) for part in (source, target, test))
    centre = X_target.mean(1, keepdim=True)
    X_source, X_target, X_test = X_source - X_source.mean(1, keepdim=True), X_target - centre, X_test - centre
    scale = ((X_source.var(1) + X_target.var(1)) / 2).sqrt()[:, None]
    scale[scale == 0] = 1
    ys = (torch.tensor([y for _, y in part], dtype=torch.float64) for part in (source, target, test))
    return [(X / scale, y) for X, y in zip((X_source, X_target, X_test), ys, strict=True)]


def estimate(X: Tensor, y: Tensor, w: Tensor) -> tuple[float, float]:
    """Estimates of ⟨w̃,μ_β⟩ and ‖μ_β‖² from target samples X (p, n), y; w̃ knows nothing of them.

    The first is the mean of y⟨w̃,x⟩, the second that of yᵢyⱼ⟨xᵢ,xⱼ⟩ over i ≠ j (‖mean of yx‖² would be p/n too great):
    unbiased, but of a few samples perhaps negative. No μ_β is shorter than its part along w̃: the least allowed.
    """
    c = float(y @ (X.T @ w)) / len(y)
    mu2 = float(((X @ y).square().sum() - X.square().sum()) / (len(y) * (len(y) - 1)))
    return c, max(mu2, c**2 / float(w @ w))


def leave_one_out(X: Tensor, y: Tensor, w: Tensor, alphas: Tensor, gamma: float) -> float:
    """The α with the fewest errors when each target sample in turn is predicted from the others; of equals the median.

    With H = XᵀQX/n the residual of sample i, left out, is [(I − H)(y − αXᵀw̃)]ᵢ / (1 − Hᵢᵢ): linear in α. (nγ stays.)
    """
    H = X.T @ ridge(X, X / len(y), gamma)
    out = torch.stack([y, X.T @ w], 1)
    own, correction = ((out - H @ out) / (1 - H.diagonal())[:, None]).T
    right = (y[:, None] * (y[:, None] - own[:, None] + alphas * correction[:, None]) > 0).sum(0)
    return float(alphas[right == right.max()].median())


def transfer(source: Domain, target: Domain, sizes: Sizes, alphas: Tensor, name: str = "") -> dict[str, Any]:
    """One pair: accuracy over α, and by every way to choose it, over draws of source and target samples."""
    pools = (
        balanced(source.train, sizes.pool, f"{name}, source", sizes.N),
        balanced(target.train, sizes.pool, f"{name}, target", 2 * sizes.n),
        balanced(target.test, sizes.test, f"{name}, test", 2),
    )
    (X_source, y_source), (X_target, y_target), (X_test, y_test) = features(*pools, sizes.p)
    mu_known = X_target @ y_target / len(y_target)
    generator, curves, ways, chosen, cosines = torch.Generator().manual_seed(0), [], [], [], []

    def draw(X: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
        rows = [(y == sign).nonzero()[:, 0] for sign in (1, -1)]
        chosen = torch.cat([r[torch.randperm(len(r), generator=generator)[: count // 2]] for r in rows])
        return X[:, chosen], y[chosen]

    for _ in range(sizes.draws):
        X, y = draw(X_source, y_source, sizes.N)
        w = ridge(X, (X @ y / len(y))[:, None], sizes.gamma)[:, 0]
        X, y = draw(X_target, y_target, sizes.n)
        own, correction = ridge(X, torch.stack([X @ y, X @ (X.T @ w)], 1) / len(y), sizes.gamma).T
        known = float(w @ mu_known), float(mu_known @ mu_known)
        of = partial(Target, eta=sizes.p / sizes.n, gamma=sizes.gamma, w2=float(w @ w))
        star, star_known = (alpha_star(of(mu2, c=c)) for c, mu2 in (estimate(X, y, w), known))
        chosen.append([0.0, 1.0, star, leave_one_out(X, y, w, alphas, sizes.gamma), star_known])
        tried = torch.cat([torch.tensor(chosen[-1], dtype=torch.float64), alphas])
        # The scores of w_α are linear in α, so three passes over the test texts serve all of them.
        scores = torch.stack([own, w - correction, w]) @ X_test * y_test
        right = (scores[0] + tried[:, None] * scores[1] > 0).double().mean(1)
        curves.append(right[5:])
        ways.append(torch.cat([right[:5], (scores[2:] > 0).double().mean(1)]))
        cosines.append(known[0] / float(w.norm() * mu_known.norm()))
    found = {"name": name, "test_texts": len(y_test), "cosine": median(cosines), "mu2": float(mu_known @ mu_known)}
    return found | _summary(alphas, torch.stack(curves), torch.stack(ways), torch.tensor(chosen, dtype=torch.float64))


def _summary(alphas: Tensor, curves: Tensor, ways: Tensor, chosen: Tensor) -> dict[str, Any]:
    """Over draws: curves (draws, k), accuracy (draws, ways without the best) and α (draws, 5)."""
    curve, curve_error = mean_and_error(curves)
    best = int(curve.argmax())
    ways = torch.cat([ways[:, :5], curves[:, [best]], ways[:, 5:]], 1)
    columns = torch.stack([*mean_and_error(ways), *mean_and_error(ways - ways[:, [1]])], 1).tolist()
    names = "mean", "error", "gain", "gain_error"
    found = {way: dict(zip(names, column, strict=True)) for way, column in zip(WAYS, columns, strict=True)}
    quartiles = chosen.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 0).T.tolist()
    alpha = dict(zip(MARKS, [*quartiles, [float(alphas[best])] * 3], strict=True))
    return {"ways": found, "alpha": alpha, "curve": curve.tolist(), "curve_error": curve_error.tolist()}


class AlphaLinear(Experiment):
    name: ClassVar[str] = "alpha-linear"
    summary: ClassVar[str] = "α-LoRA's linear transfer on texts: accuracy at α = 0, 1, the estimated α* and others"

    def run(self, setting: Setting) -> Outcome:
        return outcome(pairs_of(setting), Sizes(draws=50 if setting.scale == "small" else 500), setting.log)


def outcome(pairs: dict[str, tuple[Domain, Domain]], sizes: Sizes, log: Callable[[str], None]) -> Outcome:
    """Everything about these pairs."""
    alphas = torch.linspace(-2, 10, 121, dtype=torch.float64)
    found = []
    for name, (source, target) in pairs.items():
        log(f"{name}: {sizes.draws} draws")
        found.append(transfer(source, target, sizes, alphas, name))
    content = {"sizes": asdict(sizes), "alphas": alphas.tolist(), "pairs": found}
    return Outcome(content, [_table(found, sizes)], {"accuracy": _figure(content)}, _remarks(found))


def _table(found: Sequence[dict[str, Any]], sizes: Sizes) -> TextTable:
    rows = []
    for each in found:
        name = f"{each['name']} ({each['cosine']:.2f})"
        for way, at in each["ways"].items():
            gain = "—" if way == ONE else f"{100 * at['gain']:+.2f} ± {100 * at['gain_error']:.2f}"
            low, middle, high = each["alpha"].get(way, (None, None, None))
            alpha = "—" if low is None else f"{middle:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low < high else "")
            rows.append(
                [name * (way == WAYS[0]), way, alpha, f"{100 * at['mean']:.2f} ± {100 * at['error']:.2f}", gain]
            )
    for name, (one, star) in PUBLISHED.items():
        rows.append([f"{name}, published", ONE, "—", f"{one:.2f}", "—"])
        rows.append(["", STAR, "—", f"{star:.2f}", f"{star - one:+.2f}"])
    title = f"Mean ± standard error, {sizes.draws} draws of {sizes.N} source and {sizes.n} target samples; paired gains"
    columns = ["source → target (cosine of w̃, μ_β)", "α", "median [quartiles]", "accuracy, %", "gain over α = 1"]
    return TextTable(title, columns, rows)


def _remarks(found: Sequence[dict[str, Any]]) -> list[str]:
    def verdict(way: str, words: str) -> str:
        ways = [each["ways"][way] for each in found]
        better, worse = (sum(sign * w["gain"] > 2 * w["gain_error"] for w in ways) for sign in (1, -1))
        low, high = (f"{100 * pick(w['gain'] for w in ways):+.2f}" for pick in (min, max))
        shares = f"better by more than two standard errors in {better} of {len(ways)} pairs, worse in {worse}"
        return f"{words}: {low} to {high} points over α = 1; {shares}, otherwise within noise"

    alone = sum(all(e["ways"][ALONE]["mean"] > e["ways"][w]["mean"] for w in WAYS[:4]) for e in found)
    return [
        verdict(STAR, "α* estimated from the target samples"),
        verdict(LEFT_OUT, "α by leave-one-out"),
        verdict(KNOWN, "α* with μ_β from all training labels (not available to a user)"),
        f"w̃ alone, without any target sample, beats every α that a user can have in {alone} of {len(found)} pairs",
        "the paper's gains, 0.2 to 2.4 points, are on Amazon reviews, not available here: only their size compares",
        "the unlabelled texts behind words, centres and variances are far more than the n target samples",
        "standard errors are over draws, with one test set a pair: they hold no noise of the choice of test texts",
    ]


def _figure(content: dict[str, Any]) -> Figure:
    alphas, found = content["alphas"], content["pairs"]
    shape = ceil(len(found) / 5), min(len(found), 5)
    figure = Figure(figsize=(3.2 * shape[1], 3 * shape[0] + 0.6), layout="constrained")
    axes = [figure.add_subplot(*shape, i + 1) for i in range(len(found))]
    for axis, each in zip(axes, found, strict=True):
        middle, error = 100 * torch.tensor(each["curve"]), 100 * torch.tensor(each["curve_error"])
        axis.plot(alphas, middle, color="#2a6f97", label="one α in all draws ± standard error")
        axis.fill_between(alphas, middle - error, middle + error, color="#2a6f97", alpha=0.2, linewidth=0)
        axis.axhline(100 * each["ways"][ALONE]["mean"], color="grey", linestyle=":", label=ALONE)
        for way, (marker, colour) in MARKS.items():
            at = each["ways"][way]
            left, x, right = (min(max(a, alphas[0]), alphas[-1]) for a in each["alpha"][way])
            axis.errorbar(
                [x], [100 * at["mean"]], xerr=[[x - left], [right - x]], yerr=[100 * at["error"]], fmt=marker,
                color=colour, markersize=8 if marker == "*" else 5, elinewidth=0.9, label=way, zorder=3,
            )  # fmt: skip
        least = min(each["ways"][way]["mean"] for way in WAYS)
        axis.set_ylim(bottom=100 * least - 1.5)  # far below 0 the curve falls without end and would flatten the rest
        axis.set_title(f"{each['name']} (cosine {each['cosine']:.2f})", fontsize=9)
        axis.grid(alpha=0.25)
    figure.supxlabel("α (marks: median over draws, with quartiles)", fontsize=10)
    figure.supylabel("test accuracy, %", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


EXPERIMENTS = (AlphaLinear,)
