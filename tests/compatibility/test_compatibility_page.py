"""docs/compatibility.md says what goes with what: each row is a test, and each test has its row."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from helpers.families import FAMILIES, table, written

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs" / "compatibility.md"
SUITE = HERE.parent.parent / "benchmarks" / "results" / "peft_suite.json"


def _tests(path):
    """``file::test`` or, where a test runs over cases, ``file::test[case]``."""
    for name, function in vars(importlib.import_module(path.stem)).items():
        if name.startswith("test_"):
            marks = [m for m in getattr(function, "pytestmark", ()) if m.name == "parametrize" and m.args[0] == "case"]
            yield from (f"{path.name}::{name}[{case}]" for mark in marks for case in mark.args[1])
            if not marks:
                yield f"{path.name}::{name}"


@pytest.mark.parametrize("path", sorted(set(HERE.glob("test_*.py")) - {Path(__file__)}), ids=lambda path: path.stem)
def test_each_row_is_a_test_and_each_test_has_a_row(path):
    rows = re.findall(rf"`({path.name}::[^`]+)`", DOCUMENT.read_text(encoding="utf-8"))
    assert sorted(rows) == sorted(_tests(path))


@pytest.mark.parametrize("store", ["adapter", "base"])
def test_each_of_pefts_tests_that_fails_with_scalora_only_is_listed(store):
    """Refusals of the base store are listed as one: they meet whatever saves, adds or switches off adapters."""
    found = json.loads(SUITE.read_text(encoding="utf-8"))[store]["only_with_scalora"]
    page = DOCUMENT.read_text(encoding="utf-8")
    own = {message: tests for message, tests in found.items() if store == "adapter" or "ScaloraError" not in message}
    assert own
    for message, tests in own.items():
        for test in tests:
            assert re.search(rf"^\| {store} \|.*`{test.partition('::')[2]}`", page, re.M), message


def test_what_is_said_of_several_processes_is_a_test():
    section = DOCUMENT.read_text(encoding="utf-8").partition("## Recipes on several processes")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(test_\w+)`", section))
    there = "".join(path.read_text(encoding="utf-8") for path in HERE.parent.rglob("test_*.py"))
    assert named
    assert not {name for name in named if f"\ndef {name}(" not in there}


def test_the_table_of_families_is_what_is_adapted():
    page = DOCUMENT.read_text(encoding="utf-8")
    assert page == written(page), "PYTHONPATH=src:tests python -m helpers.families writes it"


def test_a_row_whose_library_is_not_installed_stays(monkeypatch):
    away = dataclasses.replace(FAMILIES["unet"], needs="no_such_library")
    monkeypatch.setattr("helpers.families.FAMILIES", {"unet": away})
    former = "| `UNet2DConditionModel` | as it was | `test_families.py::test_trained_saved_and_loaded[unet]` |"
    assert table(former).splitlines()[-1] == former
    assert "no_such_library is not installed" in table()
