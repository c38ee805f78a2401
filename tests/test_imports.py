"""Imports flow one way: mathematics ← engine ← integrations ← methods ← training ← command line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "scalora"
# Each layer may import itself and the ones before it.
LAYERS = [
    ["errors", "_shapes", "quiet", "files", "sharded"],
    ["nnls", "scaling", "lowrank", "directions", "reference", "thin_sum"],
    [
        "config",
        "fingerprint",
        "moments",
        "adapters",
        "probes",
        "merged_linear",
        "fused",
        "hadamard",
        "stats",
        "stores",
        "watch",
        "groups",
    ],
    ["refresh", "engine", "plain"],
    ["integrations"],
    ["assets", "dense", "models", "data_files", "data_forms", "data", "suites", "tasks"],
    ["methods"],
    ["recipes", "provenance", "run_folder", "callbacks", "plots", "head_rate", "loading", "training"],
    ["artefact", "energies", "base_model", "restored", "probe", "export"],
    ["arena"],
    ["experiments"],
    ["cli", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _module(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    """Top-level parts of scalora that a file imports, inside functions too."""
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            origin = (*package[: len(package) - node.level + 1], *(node.module or "").split(".")) if node.level else ()
            parts = [part for part in (origin or (node.module or "").split(".")) if part]
            if parts[:1] == ["scalora"]:
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("scalora.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    if path == ROOT / "__init__.py":
        return  # the table of contents
    importer = _module(path)
    assert importer in LEVEL, f"{importer} has no place in the order yet: give it one in this test"
    for imported in _imported(path):
        assert LEVEL.get(imported, 99) <= LEVEL[importer], f"{importer} must not import {imported}"


def test_a_bare_import_is_light():
    heavy = "('torch', 'peft', 'transformers', 'pydantic')"
    code = f"import sys, scalora, scalora.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_core_needs_torch_and_peft_only():
    """What `pip install scalora` brings: no package of the extras is imported by the library's three entry points."""
    extras = ("datasets", "typer", "rich", "pydantic", "matplotlib", "optuna", "sklearn", "scipy", "jaxtyping", "trl")
    code = f"""
import sys
for name in {extras!r}:
    sys.modules[name] = None
import scalora
for name in scalora.__all__:
    getattr(scalora, name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
