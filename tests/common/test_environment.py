"""The revision in results files: of the code, not of the results, and only where the package is in a checkout."""

import subprocess

import pytest

from scalora.common.environment import git_revision


@pytest.fixture
def checkout(tmp_path):
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    package = tmp_path / "src" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("x = 1\n")
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / ".gitignore").write_text("venv/\n")
    git("init", "-q")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return tmp_path, package, git("rev-parse", "--short", "HEAD").strip()


def test_a_checkout_is_dirty_where_code_changed_and_not_where_results_did(checkout):
    folder, package, revision = checkout
    assert git_revision(package) == revision
    (folder / "results.json").write_text("changed")
    assert git_revision(package) == revision
    (package / "code.py").write_text("x = 2\n")
    assert git_revision(package) == f"{revision}-dirty"
    (package / "code.py").write_text("x = 1\n")
    (folder / "benchmark.py").write_text("")
    assert git_revision(package) == f"{revision}-dirty"


def test_an_installed_package_has_no_revision_even_within_another_checkout(checkout, tmp_path_factory):
    folder, _, _ = checkout
    installed = folder / "venv" / "site-packages" / "package"
    installed.mkdir(parents=True)
    assert git_revision(installed) is None
    assert git_revision(tmp_path_factory.mktemp("no-checkout")) is None
