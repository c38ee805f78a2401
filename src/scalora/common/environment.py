"""What a result was obtained with: versions, hardware, revision, memory."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch


def peak_memory() -> int:
    """Peak bytes: allocated on the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds_waited() -> float | None:
    """Seconds that this thread has been ready to run and had no core; None where the system does not say (not Linux).

    Where others use the machine these grow, and times say little.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


def environment() -> dict[str, Any]:
    """Versions and hardware, for results files."""
    names = ("scalora", "torch", "transformers", "peft", "accelerate", "datasets")
    return {
        "versions": {name: _version(name) for name in names},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str | None:
    """None where it is not installed: a checkout runs without that, and without what only the command line needs."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision(package: Path = Path(__file__).parent) -> str | None:
    """The revision of the checkout that the package is tracked in, `-dirty` where Python files of it were changed.

    Results that lie in the same checkout do not count as changes. None where it was installed, also within the
    checkout of something else.
    """
    if not _git(package, "ls-files", "."):
        return None
    revision = _git(package, "rev-parse", "--short", "HEAD")
    return f"{revision}-dirty" if _git(package, "status", "--porcelain", ":/*.py") else revision or None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
