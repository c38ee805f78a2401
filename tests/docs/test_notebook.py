"""The quickstart runs from top to bottom, and is committed with what it printed and drew."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _printed(notebook):
    return "".join(out.text for cell in _code(notebook) for out in cell.outputs if out.output_type == "stream")


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_with_its_outputs(committed):
    assert [cell.execution_count for cell in _code(committed)] == list(range(1, len(_code(committed)) + 1))
    outputs = [out for cell in _code(committed) for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 3
    words = json.dumps([out for out in outputs if "data" not in out]) + "".join(cell.source for cell in committed.cells)
    assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|usr)/", words)


def test_it_runs_and_shows_what_it_says(committed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh = nbformat.from_dict(committed)
    NotebookClient(fresh, timeout=300, kernel_name="python3").execute()
    printed = _printed(fresh)
    nll = {
        name.strip(): [float(value) for value in values.split()]
        for name, values in re.findall(r"^(.*) test nll, three seeds: (.*)$", printed, flags=re.MULTILINE)
    }
    assert sum(nll["refreshes"]) < sum(nll["ScaLoRA-I"]) < sum(nll["LoRA"])
    assert re.search(r"LoRA +rank of the middle layer's update: 2\n", printed)
    assert "the loaded adapter scores the same: True" in printed
    strip = re.compile(r"[\d.]+")  # the same lines, whatever the last digits are on this machine
    assert strip.sub("", printed) == strip.sub("", _printed(committed))
