"""Header and place of every result: the command, the revision and the environment, in a file of benchmarks/results."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from scalora.common.environment import environment, git_revision
from scalora.common.files import write_json

RESULTS = Path("benchmarks/results")  # in the checkout, whose root is the working directory


def parser(doc: str | None, place: str) -> argparse.ArgumentParser:
    """Options of a script: ``--output``, by default ``place`` among the results, and those that the caller adds."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--output", type=Path, default=RESULTS / place, help="where the results go (%(default)s)")
    return found


def header(**packages: str) -> dict[str, Any]:
    """What a result was obtained with; ``packages`` are versions that matter beside those of the environment."""
    spec = sys.modules["__main__"].__spec__
    script = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return {
        "command": shlex.join([*script, *sys.argv[1:]]),
        "git_revision": git_revision(),
        "environment": environment() | packages,
    }


def write(path: Path, content: dict[str, Any], **packages: str) -> None:
    """Write ``content`` under its header."""
    save(path, header(**packages) | content)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as it is: for results that come one by one, each with a header of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content, depth=3)


def earlier(path: Path) -> dict[str, Any]:
    """What an earlier call has left there; empty where nothing is."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
