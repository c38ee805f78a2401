"""Files that are documents: each a row, and in one split only."""

import sysconfig
from pathlib import Path

import pytest

from scalora.common.errors import ScaloraError
from scalora.tasks.data.rows import DataSpec, load_splits


def load(**fields):
    return load_splits(DataSpec(**fields), ("text",))


@pytest.fixture
def folder(tmp_path):
    for name, text in (
        ("a.md", "one\r\ntwo"),
        ("sub/deep/b.md", "three"),
        ("sub/c.txt", "\ufefffour"),
        ("d.md", " \n"),
    ):
        path = tmp_path / "notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return tmp_path


def test_a_pattern_names_files_that_are_a_document_each(folder):
    rows = load(train="notes/**/*.md", test="notes/sub/c.txt", folder=str(folder))
    assert [row["text"] for row in rows.test] == ["four"]
    assert {row.place: row["text"] for row in rows.train} == {
        "notes/**/*.md, a.md": "one\r\ntwo",
        "notes/**/*.md, sub/deep/b.md": "three",
    }
    rows = load(train=str(folder / "notes" / "*" / "*.txt"), test=str(folder / "notes" / "*.md"))
    assert [row["text"] for row in (*rows.train, *rows.test)] == ["four", "one\r\ntwo"]


def test_splits_are_of_documents(folder):
    splits = load(train="notes/**/*.*", test_size=1, validation_size=1, folder=str(folder))
    assert sorted(row["text"] for rows in splits for row in rows) == ["four", "one\r\ntwo", "three"]


def test_mistakes(folder):
    with pytest.raises(ScaloraError, match=r"task\.data\.train: no file matches .*\*\.rst; check the pattern"):
        load(train="notes/*.rst", test_size=1, folder=str(folder))
    (folder / "notes" / "e.md").write_bytes(b"caf\xe9")
    with pytest.raises(ScaloraError, match=r"e\.md, line 1: not UTF-8"):
        load(train="notes/*.md", test_size=1, folder=str(folder))
    (folder / "empty.txt").write_text("")
    with pytest.raises(ScaloraError, match="holds no rows"):
        load(train="empty.txt", test_size=1, folder=str(folder))


def test_the_standard_library_is_this_interpreters_without_tests_and_tables():
    splits = load(train="python-stdlib", test_size=5)
    places = {row.place.removeprefix("python-stdlib, "): row["text"] for row in splits.train + splits.test}
    folder = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py", "asyncio/tasks.py"):
        assert places[name] == (folder / name).read_text(encoding="utf-8")
    parts = {part for name in places for part in Path(name).parts}
    assert not {"test", "tests", "site-packages", "encodings", "pydoc_data"} & parts
