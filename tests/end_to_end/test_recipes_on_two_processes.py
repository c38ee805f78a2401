"""The examples that train a recipe on several processes run as they stand, on two; and what is seen when they fail."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import workspace
from scalora.common.files import is_sealed

FOLDER = Path(__file__).parents[2] / "examples" / "processes"
BIN = Path(sys.executable).parent
DDP = ["sh", FOLDER / "torchrun.sh"]
TWO = ["--set", "training.per_device_train_batch_size=2"]


def _environment(**more):
    path = f"{more.pop('first', BIN)}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PROCESSES": "2", **more}


def _run(command, folder, **more):
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=folder, env=_environment(**more), capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_launches_a_recipe(tmp_path, name):
    recipe = workspace.lay(tmp_path)
    command = [BIN / "accelerate", "launch", "--config_file", FOLDER / f"{name}.yaml", "--num_processes", "2"]
    done = _run([*command, "-m", "scalora", "train", recipe, *TWO], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scoring after training") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["processes"] == 2
    sharded = (tmp_path / "run" / "checkpoints" / "checkpoint-8" / "pytorch_model_fsdp_0").exists()
    assert sharded == (name == "fsdp2")


SRUN = """#!/bin/bash
"$@" & "$@" & wait -n && wait -n
"""


def test_two_nodes_of_slurm(tmp_path):
    recipe = workspace.lay(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho localhost\necho other\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_NODELIST": "x[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "PORT": port, "PROCESSES": "1"}
    done = _run(["bash", FOLDER / "two_nodes.sbatch", recipe, *TWO], tmp_path, first=tmp_path / "bin", **job)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scoring after training") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["processes"] == 2


def _processes_of(launcher):
    return {
        child.environ()["RANK"]: child
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if "RANK" in child.environ()
    }


def test_a_killed_process_ends_the_other_and_the_run_resumes(tmp_path):
    recipe, steps = workspace.lay(tmp_path), ["--set", "training.max_steps=150", "--set", "training.save_steps=10"]
    command = [str(word) for word in [*DDP, recipe, *TWO, *steps]]
    checkpoints = tmp_path / "run" / "checkpoints"
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(command, cwd=tmp_path, env=_environment(), stdout=said, stderr=said)
        while launcher.poll() is None and not any(map(is_sealed, checkpoints.glob("checkpoint-*"))):
            time.sleep(0.1)
        found = _processes_of(launcher)
        found["1"].send_signal(signal.SIGKILL)
        began = time.monotonic()
        assert launcher.wait(timeout=60) != 0
        psutil.wait_procs(found.values(), timeout=60 - (time.monotonic() - began))
    assert not any(process.is_running() for process in found.values())
    assert time.monotonic() - began < 60
    assert (tmp_path / "said").read_text().count("another process of this run has ended") == 1
    left = sorted(checkpoints.iterdir())
    assert left
    assert all(map(is_sealed, left))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith(".tmp")]
    done = _run([*command, "--resume"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"training from {max(left, key=lambda path: int(path.name[11:])).name}" in done.stdout
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 150


def test_bad_input_is_one_message_and_no_traceback_of_ours(tmp_path):
    recipe = workspace.lay(tmp_path)
    for arguments, message in (
        (["--set", "method.name=lore"], "error: method.name is 'lore'"),
        (["--set", "task.answer=lable"], "lable"),
    ):
        done = _run([*DDP, recipe, *arguments], tmp_path)
        ours = [line for line in done.stderr.splitlines() if message in line]
        assert len(ours) == 1, done.stderr
        assert "scalora/" not in done.stderr
        assert "exitcode  : 2" in done.stderr  # of torchrun's report, whose own exit code is 1
        assert not (tmp_path / "run").exists()


def test_a_comparison_is_refused_by_name(tmp_path):
    recipe = workspace.lay(tmp_path)
    late = tmp_path / "late.py"  # the first process, which speaks, comes last
    late.write_text(
        "import os, runpy, sys, time\n"
        "time.sleep(3 if os.environ['RANK'] == '0' else 0)\n"
        "sys.argv[0] = 'scalora'\n"
        "runpy.run_module('scalora', run_name='__main__')\n"
    )
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", late, "compare", recipe]
    done = _run([*command, "--methods", "lora", "--output", tmp_path / "out"], tmp_path)
    assert done.stderr.count("error: WORLD_SIZE is 2, but scalora compare runs in one process") == 1
    assert not (tmp_path / "out").exists()
