"""``scalora doctor``: what this machine has, what is reachable, what is cached."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys

from rich.table import Table

from ..common.quiet import quiet
from .console import plain_console
from .guard import guarded

_PACKAGES = (
    "scalora",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "optuna",
    "lm-eval",
    "bitsandbytes",
)


def doctor() -> None:
    """Tell versions, devices, and what is reachable and cached."""
    with guarded():
        quiet()
        console = plain_console()
        for title, rows in (
            ("versions", _versions()),
            ("devices", _devices()),
            ("reachable", _reachable()),
            ("cached", _cached()),
        ):
            table = Table(title=title, title_justify="left", show_header=False)
            for row in rows:
                table.add_row(*row)
            console.print(table)


def _versions() -> list[tuple[str, str]]:
    rows = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _devices() -> list[tuple[str, str]]:
    import torch

    from ..runs.precision import choose, find_device

    rows = [
        (
            "cpu",
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        )
    ]
    rows += [
        (
            f"cuda:{i}",
            f"{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB",
        )
        for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        rows.append(("mps", "available"))
    return [*rows, ("precision: auto", str(choose(find_device())))]


def _reachable() -> list[tuple[str, str]]:
    return [("model hub", _hub()), ("package index (for packaged models and data)", _index())]


def _hub() -> str:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "switched off (HF_HUB_OFFLINE)"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)  # HfApi would retry, aloud, for half a minute
    except Exception as error:  # whatever the network does, a report of it is what was asked for
        return f"no ({type(error).__name__}): use local folders, GGUF files or packaged models"
    return "yes"


def _index() -> str:
    command = [sys.executable, "-m", "pip", "index", "versions", "pip", "--disable-pip-version-check", "--timeout", "5"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "no"
    return "yes" if done.returncode == 0 else "no"


def _cached() -> list[tuple[str, str, str]]:
    from ..common import packaged

    rows = [
        (name, "cached" if packaged.is_cached(name) else "fetched on first use", asset.summary)
        for name, asset in packaged.ASSETS.items()
    ]
    return [*rows, ("cache folder", str(packaged.cache_dir()), "set SCALORA_CACHE to move it")]
