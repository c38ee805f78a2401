"""The launch files run as they stand: two machines, here two groups of one process that meet on this one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "distributed"


def _free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def test_torchrun_on_two_nodes(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"NODES": "2", "PROCESSES": "1", "HEAD": f"localhost:{_free_port()}", "PATH": path}
    nodes = [
        subprocess.Popen(
            ["sh", FOLDER / "several_nodes.sh"], cwd=tmp_path, env={**os.environ, **settings},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum("2 processes: Event(step=40" in printed for printed, _ in outputs) == 1
    assert (tmp_path / "runs" / "distributed" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_launch_files(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines
    if "fsdp2" in path.stem:
        assert config.fsdp_config["fsdp_version"] == 2
