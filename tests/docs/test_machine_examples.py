"""The examples for several machines: what they run is a command that there is, with the URL where it belongs."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from scalora.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"
URL = "postgresql+psycopg://user:s3cret@host/trials"
# Stand for the programs: they note what they were called with.
SCALORA = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps([os.environ.get("SCALORA_STORAGE"), sys.argv[1:]]) + "\\n")
"""
SSH = """#!/bin/bash
echo "$*" >> "$NOTES.ssh"
shift
exec env -u SCALORA_STORAGE bash -c "$*"
"""


@pytest.fixture
def calls(tmp_path):
    """Runs an example in a folder whose name has a space; what scalora was called with."""
    place = tmp_path / "a place"
    (place / "bin").mkdir(parents=True)
    for name, text in {"scalora": SCALORA, "ssh": SSH, "srun": '#!/bin/bash\nexec "$@"\n'}.items():
        (place / "bin" / name).write_text(text)
        (place / "bin" / name).chmod(0o755)
    path = f"{place / 'bin'}:{os.environ['PATH']}"

    def run(name, *arguments, **environment):
        full = {**os.environ, "PATH": path, "NOTES": str(place / "notes"), **environment}
        done = subprocess.run(
            ["bash", EXAMPLES / name, *arguments], cwd=place, env=full, capture_output=True, text=True, check=False
        )
        notes = place / "notes"
        lines = notes.read_text().splitlines() if notes.exists() else []
        return done, [json.loads(line) for line in lines]

    return run


def _parsed(arguments):
    """What the command line makes of arguments; it raises where an option does not exist."""
    verb, *rest = arguments
    return get_command(app).commands[verb].make_context(verb, rest).params  # pyright: ignore


@pytest.mark.parametrize("name", ["slurm_array.sbatch", "ssh_workers.sh"])
def test_the_syntax_is_right_and_what_is_missing_is_said(calls, name):
    subprocess.run(["bash", "-n", EXAMPLES / name], check=True)
    for arguments, environment, words in (
        ((), {"SCALORA_STORAGE": ""}, "SCALORA_STORAGE: set it"),
        ((), {"SCALORA_STORAGE": URL}, "give RECIPE.yaml"),
        (("x.yaml",), {"SCALORA_STORAGE": URL}, "give the NAME"),
    ):
        done, called = calls(name, *arguments, **environment)
        assert done.returncode != 0
        assert words in done.stderr
        assert not called


def test_a_task_of_an_array_is_a_worker(calls):
    directives = [line for line in (EXAMPLES / "slurm_array.sbatch").read_text().splitlines() if "#SBATCH" in line]
    assert any("--array=" in line for line in directives)
    order = {"SCALORA_STORAGE": URL, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    done, [(storage, arguments)] = calls("slurm_array.sbatch", "my recipe.yaml", "mine", **order)
    assert done.returncode == 0, done.stderr
    found = _parsed(arguments)
    assert storage == URL
    assert (found["recipe_path"], found["study"], found["output"]) == ("my recipe.yaml", "mine", "runs/mine/3")


def test_each_machine_gets_a_worker_and_the_url_unseen(calls, tmp_path):
    done, called = calls("ssh_workers.sh", "my recipe.yaml", "mine", "one", "two", SCALORA_STORAGE=URL)
    assert done.returncode == 0, done.stderr
    assert len(called) == 3  # and this machine
    for storage, arguments in called:
        found = _parsed(arguments)
        assert storage == URL
        assert (found["recipe_path"], found["study"], found["output"]) == ("my recipe.yaml", "mine", "runs/mine")
    assert "s3cret" not in (tmp_path / "a place" / "notes.ssh").read_text()
