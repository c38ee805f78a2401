"""The floor plan: each room may use those before it and nothing else; no two things in the package have one name."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
FILES = [path for path in sorted(SRC.rglob("*.py")) if path != SRC / "scalora" / "__init__.py"]  # the table of contents
# Room → the rooms that it may use.
ROOMS: dict[str, set[str]] = {"common": set(), "algebra": {"common"}, "layers": {"common"}}
ROOMS["engine"] = {"common", "algebra", "layers"}
ROOMS["models"] = {"common", "layers"}
ROOMS["tasks"] = {"common", "layers", "models"}
ROOMS["methods"] = {*ROOMS["engine"], "engine", "models"}
ROOMS["runs"] = {*ROOMS["methods"], "methods", "tasks"}
ROOMS["arena"] = {*ROOMS["runs"], "runs"}
ROOMS["scalora_papers"] = {*ROOMS["arena"], "arena"}
ROOMS["cli"] = ROOMS["__main__"] = {*ROOMS["scalora_papers"], "scalora_papers", "cli"}

REGISTRIES = {"METHODS", "TASKS", "EXPERIMENTS"}  # what a file lists under these names is found by it


def _room(parts):
    return parts[0] if parts[0] == "scalora_papers" else parts[1].removesuffix(".py")


def _imported(path):
    """The rooms that a file imports from, inside functions too."""
    package = path.relative_to(SRC).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*start, *(node.module or "").split(".")]
            modules = [parts] if len(parts) > 1 and parts[1] else [[parts[0], alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        else:
            continue
        yield from (_room(parts) for parts in modules if parts[0] in ("scalora", "scalora_papers"))


def test_rooms_use_only_those_before_them():
    seen = {path: _room(path.relative_to(SRC).parts) for path in FILES}
    for path, room in seen.items():
        assert set(_imported(path)) <= ROOMS[room] | {room}, path
    assert set(seen.values()) == set(ROOMS)


def _names(path):
    """The public classes, functions and constants that a file defines."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names = [getattr(target, "name", None) or getattr(target, "id", "_") for target in targets]
        yield from {name for name in names if not name.startswith("_")} - REGISTRIES


def test_no_two_public_names_are_alike():
    count = Counter(name for path in FILES for name in _names(path))
    assert not {name for name, files in count.items() if files > 1}


def test_no_two_test_files_have_one_name():
    """Pytest would import one for the other."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))


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
