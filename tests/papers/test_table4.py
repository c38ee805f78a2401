"""The costs of events: the fit on known powers, the clock, exact bytes, and what the experiment leaves."""

import json
import time

import pytest
import torch

from scalora.engine.stores.adapter import SLOTS
from scalora_papers import Setting
from scalora_papers.table4_complexity import PARTS, Clock, Complexity, Size, fit_law, measure_cost, memory

SIZES = [Size(n, n, r) for n in (16, 32, 64) for r in (2, 4)] + [Size(16, 64, 2), Size(64, 16, 2)]


class Small(Complexity):
    sizes, ranks = {"small": (16, 32)}, {"small": (1, 2)}
    intervals, steps = (1, 2), SLOTS + 1


def test_the_fit_finds_the_powers_beyond_the_fixed_cost():
    points = [(size, 1.0 + 0.5 * size.m * size.n**0.5 * size.r**2, 1.0) for size in SIZES]
    law = fit_law(points, lambda m, n, r: m * n * r)
    assert law.exponents == pytest.approx([1, 0.5, 2, 1.5])
    assert law.formula == pytest.approx([1, 1, 1, 2])
    assert law.errors == pytest.approx([0] * 4, abs=1e-6)
    assert law.seconds(*SIZES[3]) == pytest.approx(points[3][1])


def test_errors_of_the_fit_are_those_of_least_squares():
    """Against the textbook's: residual variance times the inverse of the normal matrix."""
    torch.manual_seed(0)
    noise = torch.randn(len(SIZES), dtype=torch.float64) / 10
    points = [(size, size.m * float(e.exp()), 0.0) for size, e in zip(SIZES, noise, strict=True)]
    law = fit_law(points, lambda m, n, r: m)
    X = torch.tensor([[1.0, *size] for size in SIZES], dtype=torch.float64)
    X[:, 1:] = X[:, 1:].log()
    residual = noise - X @ torch.linalg.lstsq(X, noise[:, None]).solution[:, 0]
    covariance = residual.square().sum() / (len(SIZES) - 4) * torch.linalg.inv(X.T @ X)
    assert law.errors[:3] == pytest.approx(covariance.diagonal()[1:].sqrt().tolist())
    assert law.errors[3] == pytest.approx(float(covariance[1:3, 1:3].sum().sqrt()))  # of p + q


def test_a_part_hidden_by_its_fixed_cost_has_no_exponents():
    law = fit_law([(size, 1.1, 1.0) for size in SIZES], PARTS["append"].operations)
    assert (law.exponents, law.used) == ([], f"0 of {len(SIZES)}")
    assert law.seconds(16, 16, 2) == 1.0


def test_the_clock_gives_each_part_its_own_time_only(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0])  # outer starts, inner runs from 1 to 3, outer ends
    monkeypatch.setattr(time, "process_time", lambda: next(now))
    clock = Clock("cpu")
    inner = clock.timed("inner", lambda: None)
    clock.timed("outer", inner)()
    assert clock.seconds == {"inner": [2.0], "outer": [8.0]}


@pytest.mark.parametrize("store", ["base", "adapter"])
def test_real_events_are_timed(store):
    cost = measure_cost(Size(12, 10, 2), store, interval=2, steps=4 * SLOTS, device="cpu")
    expected = {"base": {"step", "factors", "merge"}, "adapter": {"beside", "factors", "append", "recompress"}}
    assert set(cost.seconds) == expected[store]
    assert all(seconds >= 0 for seconds in cost.seconds.values())
    assert cost.events > 0


def test_bytes_are_those_of_the_formulas():
    m, n, r = size = Size(20, 18, 2)
    lora = 4 * (m + n) * r
    counted = {
        (store, dtype): memory(size, store, dtype)
        for store in ("base", "adapter")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert all(found["A and B"] == lora for found in counted.values())  # PEFT keeps adapters in float32
    buffers = {key: found["buffers of the store"] for key, found in counted.items()}
    assert buffers["base", torch.float32] == 0
    assert buffers["base", torch.bfloat16] == 2 * m * n  # what rounding took away
    assert buffers["adapter", torch.float32] == (8 + SLOTS) * lora + 2 * 4  # and two numbers per layer
    assert all(found["left by an event besides"] == 8 * 13 for found in counted.values())  # one row of the history


def test_what_is_written_and_drawn(tmp_path):
    outcome = Small().run(Setting("small", tmp_path, log=lambda line: None))
    content = json.loads(json.dumps(outcome.content, allow_nan=False))
    assert set(content["laws"]) == set(PARTS)
    exponents, intervals, in_bytes = outcome.tables
    assert [row[0] for row in exponents.rows] == [part.title for part in PARTS.values()]
    assert [row[:2] for row in intervals.rows] == [["base", "1"], ["base", "2"], ["adapter", "1"], ["adapter", "2"]]
    assert all(len(row) == len(table.columns) for table in outcome.tables for row in table.rows)
    assert len(in_bytes.rows) == 12
    assert len(outcome.figures["complexity"].axes) == 2
    assert len(outcome.remarks) == len(PARTS) + 2
