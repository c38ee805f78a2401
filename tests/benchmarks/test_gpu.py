"""``python -m benchmarks.gpu`` in its smallest form: what is in its file, and that it keeps to its time."""

import json
import sys
from itertools import pairwise

import pytest
import torch
from benchmarks.gpu import budget, command, exactness, page, rivals, step
from benchmarks.gpu.failures import Failures
from benchmarks.gpu.models import random_batch, random_model, sharing_weights


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        command.main()
        return json.loads((tmp_path / "benchmarks/results/gpu.json").read_text(encoding="utf-8"))

    yield run
    torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the larger models are the default")
def test_the_smallest_form_measures_every_method_and_kind_of_event(run):
    found = run("--seconds", "600")
    assert found["failures"] == found["left_out"] == []
    assert [cell["precision"] for cell in found["cells"]] == list(rivals.PRECISIONS)
    for cell in found["cells"]:
        assert list(cell["methods"]) == list(rivals.METHODS)
        assert cell["methods"]["lora:peft"]["ratio"] == 1
        assert all(len(row["seconds"]) == step.ROUNDS and row["ratio"] > 0 for row in cell["methods"].values())
        assert cell["methods"]["white-lora"]["look_seconds_per_step"] != 0
    kinds = {(row["method"], row["kind"]) for row in found["events"]}
    assert {name for name, _ in kinds} == set(rivals.METHODS) - {"lora:peft", "hira"}
    assert {("scalora", "event"), ("scalora", "event with recompression"), ("scalora-refresh", "refresh")} < kinds
    assert all(
        row["milliseconds"] > 0 and row["launches"] is row["synchronisations"] is None for row in found["events"]
    )
    assert set(found["exactness"]) == set(exactness.METHODS)
    for name, row in found["exactness"].items():
        assert row["change"] <= exactness.LIMIT
        assert row["greatest_logit"] > 100 * exactness.LIMIT
        if name != "scalora:base":  # whose base holds a part
            assert row["reloaded"] <= exactness.LIMIT
    shown = page.tables(found)
    assert [line.startswith("|") for line in shown.splitlines()].count(True) == 3 * 2 + sum(
        len(found[part]) for part in ("cells", "events", "exactness")
    )


def test_it_stops_in_time_and_says_what_it_left_out(run):
    found = run("--seconds", "0")
    assert found["cells"] == []
    assert len(found["left_out"]) == len(rivals.PRECISIONS)


def test_a_method_that_fails_is_noted_and_the_others_go_on(monkeypatch):
    make, failures = rivals.make_runner, Failures()

    def fail(name, *rest):
        if name == "hira":
            raise RuntimeError("no such kernel")
        return make(name, *rest)

    monkeypatch.setattr(rivals, "make_runner", fail)
    monkeypatch.setattr(rivals, "METHODS", ("lora:peft", "hira"))
    cell = rivals.Cell("tiny", "autocast", 2, 8)
    found = step.measure(rivals.Rivals(cell, "cpu", budget.Budget(600), failures), cell)
    assert list(found) == ["lora:peft"]
    ((what, error),) = [(each["what"], each["error"]) for each in failures.found]
    assert what == "hira"
    assert "no such kernel" in error


def test_methods_have_modules_of_their_own_around_one_base():
    model = random_model("tiny", torch.bfloat16, "cpu")
    other = sharing_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not set(map(id, model.modules())) & set(map(id, other.modules()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_batches_have_the_tokens_that_were_asked_for():
    assert random_batch(512, "cpu", 0)["input_ids"].shape == (1, 512)
    assert random_batch(4096, "cpu", 0)["input_ids"].shape == (4, 1024)


def test_the_largest_comparisons_come_last_and_those_of_one_model_together():
    cells = command.in_order(["1", "8"], list(rivals.PRECISIONS), [64, 8], [4096, 16384])
    assert cells[0] == ("1", "bf16 base", 8, 4096)
    assert {(cell.size, cell.tokens) for cell in cells[-4:]} == {("8", 16384)}
    models = [cell.model for cell in cells[:-4]]
    assert sum(a != b for a, b in pairwise(models)) == len(set(models)) - 1
