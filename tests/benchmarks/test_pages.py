"""docs/results.md and README show what benchmarks/results holds."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from benchmarks import pages
from scalora.arena.results import decode_comparison, encode_comparison

COMMITTED = sorted((pages.ROOT / pages.FOLDER).rglob("results.json"))


@pytest.fixture(scope="module")
def written():
    return pages.pages()


def test_the_pages_on_disk_are_what_the_results_give(written):
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m benchmarks.pages"


def test_every_placeholder_is_filled_and_every_picture_is_there(written):
    page = written[pages.PAGE]
    assert "[[" not in page
    for name in pages.FIGURES:
        assert f"images/{name}.png" in page
        assert (pages.IMAGES / f"{name}.png").is_file()


def test_every_committed_result_is_shown(written):
    for file in COMMITTED:
        folder = file.parent.relative_to(pages.ROOT)
        assert str(folder) in written[pages.PAGE] or str(folder.parent) in written[pages.PAGE], folder


def test_readme_takes_the_table_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "README", tmp_path / "README.md")
    pages.README.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    text = pages.pages()[pages.README]
    assert text == f"before\n{pages.BEGIN}\n\n{pages.overview()}\n\n{pages.END}\nafter\n"
    assert len(pages.overview().splitlines()) == 2 + len(pages.OVERVIEW) + 1 <= 2 + 8  # and what a step takes


def test_a_seed_that_failed_is_shown_in_its_own_column(monkeypatch):
    record = pages._record("minilm-sarcasm-rates")
    lost = next(t for t in record.results if (t.stage, t.contender.method, t.lr, t.seed) == ("tune", "lora", 0.004, 1))
    results = {**record.results, lost: {"error": "out of memory"}}
    before = pages.seeds("minilm-sarcasm-rates", "0.004").splitlines()
    monkeypatch.setattr(pages, "_record", lambda folder: replace(record, results=results))
    after = pages.seeds("minilm-sarcasm-rates", "0.004").splitlines()
    cells = before[2].split(" | ")
    assert after[2] == " | ".join([*cells[:2], "failed", *cells[3:]])
    assert after[3:] == before[3:]


def test_a_clone_carries_little():
    listed = subprocess.run(["git", "ls-files", pages.FOLDER], cwd=pages.ROOT, capture_output=True, text=True)
    files = [pages.ROOT / name for name in listed.stdout.splitlines()]
    if not files:
        pytest.skip("this is no checkout")
    assert {file.suffix for file in files} == {".json"}
    assert sum(file.stat().st_size for file in files) < 5_000_000


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_comparisons_are_as_this_version_writes_them(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    if "trials" in content:
        again = json.loads(json.dumps(encode_comparison(decode_comparison(content, Path("committed")))))
        del again["recipe"], content["recipe"]  # what recipes can say grows
        assert again == content
