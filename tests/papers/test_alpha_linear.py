"""α-LoRA's linear transfer on small made-up texts: what it reads, how it chooses α, what it reports."""

import json
import random
from pathlib import Path

import pytest
import torch

from scalora.common.errors import ScaloraError
from scalora_papers import Setting
from scalora_papers.alpha_linear import (
    ONE,
    STAR,
    WAYS,
    Domain,
    Sizes,
    balanced,
    estimate,
    features,
    glue,
    leave_one_out,
    outcome,
    pairs_of,
)
from scalora_papers.alpha_theory import ridge

GOOD, BAD, COMMON = (
    ["fine", "great", "warm", "bright"],
    ["poor", "awful", "cold", "dull"],
    [f"word{i}" for i in range(12)],
)
SIZES = Sizes(N=120, n=20, p=18, draws=12, pool=200, test=80)


def texts(count, flipped=False, seed=0):
    """Sentences whose words tell the class three times out of four."""
    dice = random.Random(seed)
    rows = []
    for i in range(count):
        y = 1 if i % 2 else -1
        told = (y if dice.random() < 0.75 else -y) * (-1 if flipped else 1)
        words = [*dice.choices(COMMON, k=5), *dice.choices(GOOD if told > 0 else BAD, k=2)]
        rows.append(((" ".join(words),), y))
    return rows


def domain(seed, flipped=False):
    return Domain(texts(300, flipped, seed), texts(120, flipped, seed + 1))


def test_it_reports_every_pair_beside_the_published_numbers():
    pairs = {"same": (domain(0), domain(2)), "opposed": (domain(4, flipped=True), domain(2))}
    told = []
    found = outcome(pairs, SIZES, told.append)
    content = json.loads(json.dumps(found.content))
    same, opposed = content["pairs"]
    assert same["cosine"] > 0.5
    assert opposed["cosine"] < -0.5
    assert same["alpha"][STAR][1] > 0 > opposed["alpha"][STAR][1]
    assert opposed["ways"][STAR]["gain"] > 2 * opposed["ways"][STAR]["gain_error"] > 0
    assert same["ways"][ONE] | {"mean": 0, "error": 0} == dict.fromkeys(("mean", "error", "gain", "gain_error"), 0)
    best = same["ways"]["oracle: best on test"]["mean"]
    assert best == pytest.approx(max(same["curve"]))
    assert all(0.4 < same["ways"][way]["mean"] <= 1 for way in WAYS)
    table = found.tables[0].markdown()
    assert "75.22" in table
    assert "77.59" in table
    assert "+1.44" in table
    assert len(told) == 2
    assert len(found.figures["accuracy"].axes) == 2
    assert any("Amazon" in remark for remark in found.remarks)


def test_estimates_are_unbiased_and_never_below_what_the_source_shows():
    torch.manual_seed(0)
    p, n = 30, 20
    mu, w = torch.randn(2, p).double() / 5
    y = torch.tensor([1.0, -1.0]).double().repeat(n // 2)
    drawn = torch.tensor([estimate(torch.outer(mu, y) + torch.randn(p, n).double(), y, w) for _ in range(400)]).double()
    assert abs(drawn[:, 0].mean() - w @ mu) < 3 * drawn[:, 0].std() / 20
    plain = torch.stack([(torch.outer(mu, y) + torch.randn(p, n).double()) @ y / n for _ in range(400)])
    assert (plain.square().sum(1).mean() - mu @ mu) > 0.5 * p / n  # what the estimate has to undo
    assert abs(drawn[:, 1].mean() - mu @ mu) < 0.25
    assert (drawn[:, 1] >= drawn[:, 0] ** 2 / (w @ w) - 1e-6).all()


def test_leave_one_out_equals_refitting():
    torch.manual_seed(1)
    n, gamma = 12, 0.7
    X, w, y = torch.randn(9, n).double(), torch.randn(9).double(), torch.tensor([1.0, -1.0] * 6).double()
    alphas = torch.linspace(-1, 3, 41).double()
    right = torch.zeros(len(alphas))
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        A, b = X[:, rest], y[rest]
        a = ridge(A, A @ (b[:, None] - (A.T @ w)[:, None] * alphas) / (n - 1), gamma * n / (n - 1))  # nγ stays
        right += X[:, i] @ (a + w[:, None] * alphas) * y[i] > 0
    assert leave_one_out(X, y, w, alphas, gamma) == float(alphas[right == right.max()].median())


def test_features_are_centred_and_of_variance_one_whatever_the_labels():
    parts = [texts(100, seed=seed) for seed in range(3)]
    (X, _), (T, _), (test, y) = features(*parts, 15)
    assert X.shape == (15, 100)
    assert test.shape == (15, 100)
    assert y.tolist() == [y for _, y in parts[2]]
    assert X.mean(1).abs().max() < 1e-12
    assert T.mean(1).abs().max() < 1e-12
    assert torch.allclose((X.var(1) + T.var(1)) / 2, torch.ones(15).double())
    flipped = [[(text, -y) for text, y in part] for part in parts]
    assert torch.equal(features(*flipped, 15)[0][0], X)


def test_a_pair_of_texts_is_the_distance_of_both():
    pairs = [(("red sun", "red sun"), 1), (("red sun", "blue moon"), -1), (("moon", "red"), -1)]
    (X, _), *_ = features(pairs, pairs, pairs, 4)
    assert (X[:, 0] < X.max(1).values).all()  # equal texts are nearest to nothing in every word


def _write(folder: Path, task: str, header: str, rows: list[str]) -> None:
    (folder / "glue" / task).mkdir(parents=True)
    for name in ("train", "dev"):
        (folder / "glue" / task / f"{name}.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")


def test_glue_files_and_pairs(tmp_path, monkeypatch):
    _write(tmp_path, "SST-2", "sentence\tlabel", ['a " fine film\t1', "a dull film\t0"])
    _write(tmp_path, "MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t5\t6\tone\ttwo"])
    _write(
        tmp_path, "RTE", "index\tsentence1\tsentence2\tlabel", ["0\tone\ttwo\tnot_entailment", "1\tx\ty\tentailment"]
    )
    setting = Setting("small", tmp_path / "out", tmp_path, lambda line: None)
    sst2 = glue(setting, "SST-2", {"label": "label", "text": "sentence"})
    assert sorted(sst2.train) == [(('a " fine film',), 1), (("a dull film",), -1)]
    monkeypatch.setattr("scalora_papers.alpha_linear.headlines", lambda: domain(0))
    pairs = pairs_of(setting)
    assert len(pairs) == 10
    assert sorted(pairs["MRPC → RTE"][1].test) == [(("one", "two"), -1), (("x", "y"), 1)]
    long, short = pairs["SST-2: long → short"]
    assert not long.train
    assert len(short.train) == 2
    assert len(pairs_of(Setting("small", tmp_path / "out", None, lambda line: None))) == 4


def test_too_few_texts_are_refused():
    assert [y for _, y in balanced(texts(30)[:21], 10, "x", 10)] == [1] * 5 + [-1] * 5
    with pytest.raises(ScaloraError, match="news, source: only 10 texts of the rarer class, 50 are needed"):
        balanced(texts(20), 200, "news, source", 100)
