"""What --storage and --study refuse: one message, exit code 2, and never a password."""

import socket
import sys

import pytest
from typer.testing import CliRunner

from helpers import postgres, workspace
from scalora.arena.storage import read_storage, without_password
from scalora.cli import app


def _refused(tmp_path, *arguments):
    common = ["compare", str(workspace.lay(tmp_path)), "--set", "task.data.validation_size=10", "--output"]
    result = CliRunner().invoke(app, [*common, str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert "s3cret" not in result.output
    assert not (tmp_path / "out").exists()
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--storage", "s3cret"], "--storage is no URL of a database"),
        (["--storage", "postgresql+psycopg://me:s3cret@host:port/trials"], "--storage is no URL of a database"),
        (["--storage", "postgres://me:s3cret@host/trials"], "postgres is no database that SQLAlchemy knows"),
        (["--storage", "mysql+pymysql://me:s3cret@host/trials"], "the driver pymysql is not installed"),
        (["--storage", "postgresql+psycopg_async://me:s3cret@host/trials"], "psycopg_async is an asynchronous driver"),
        (["--storage", "sqlite:///nowhere/s/trials.sqlite3?password=s3cret"], "cannot be used"),
    ],
)
def test_a_url_that_cannot_be_used(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setitem(sys.modules, "pymysql", None)  # as where it is not installed
    pytest.importorskip("psycopg")
    assert words in _refused(tmp_path, *arguments, "--study", "mine")


def test_a_driver_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    told = _refused(tmp_path, "--storage", "postgresql+psycopg://me:s3cret@host/trials", "--study", "mine")
    assert "psycopg://me:***@host/trials: the driver psycopg is not installed: pip install 'scalora[storage]'" in told


def test_a_server_that_is_not_there(tmp_path):
    pytest.importorskip("psycopg")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://me:s3cret@127.0.0.1:{free.getsockname()[1]}/trials"
        told = _refused(tmp_path, "--storage", url, "--study", "mine")
    assert ":***@127.0.0.1" in told
    assert "see that the server runs" in told


@pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))
def test_what_a_server_refuses(tmp_path):
    with postgres.running() as server:
        for url, words in {
            server.url(password="s3cret-wrong"): "password authentication failed",
            server.url(database="nowhere"): 'database "nowhere" does not exist',
        }.items():
            assert words in _refused(tmp_path, "--storage", url, "--study", "mine")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--storage", "sqlite:///trials"], "--study is missing"),
        (["--storage", "nonsense"], "--storage is no URL"),
        (["--storage", "nonsense", "--seeds", "0", "--methods", "lora,nothing"], "--storage is no URL"),
        (["--methods", ""], "--methods is '': name one or more"),
        (["--methods", "lora,"], "--methods is 'lora,': name one or more"),
        (["--storage", "sqlite:///trials", "--study", ""], "--study '' is no name"),
        (["--storage", "sqlite:///trials", "--study", "x" * 201], "up to 200 characters"),
        (["--study", "mine"], "add --storage"),
    ],
)
def test_the_name_of_a_comparison(tmp_path, arguments, words):
    assert words in _refused(tmp_path, *arguments)


@pytest.mark.parametrize("form", ["--storage {}", "--storage={}"])
@pytest.mark.parametrize(
    ("url", "recorded"),
    [
        ("sqlite://me:s3cret@host/trials", "sqlite://me:***@host/trials"),
        ("sqlite://me@host/trials?password=s3cret&user=x", "sqlite://me@host/trials?password=***&user=x"),
        ("sqlite:///trials", "sqlite:///trials"),
    ],
)
def test_a_command_is_recorded_without_its_password(form, url, recorded):
    found = without_password(form.format(url).split(), url, read_storage(url, "mine"))
    assert " ".join(found).replace("%2A", "*") == form.format(recorded)


def test_a_folder_of_other_things_takes_no_comparison(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    told = _refused(tmp_path, "--output", str(other))
    assert "which is not empty and holds no comparison (notes.txt): choose another" in told
    assert [file.name for file in other.iterdir()] == ["notes.txt"]
