"""docs/optimizers.md names every optimizer that has a rule or a reason, and tests that exist."""

import re
from pathlib import Path

from scalora.engine.optimizer_rules import _REASONS, _RULES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("|")]


def _named(name, status):
    """Whether a row of this status names the package and the class."""
    package, _, cls = name.partition(".")
    if package == "bitsandbytes":  # without what says how many bits
        cls = re.sub(r"^Paged|8bit$|32bit$", "", cls)
    words = [word for word in (package, cls) if word]
    return any(all(re.search(rf"\b{word}\b", row) for word in words) and status in row for row in ROWS)


def test_every_rule_and_every_reason_has_its_row():
    assert [name for name in _RULES if not _named(name, "works")] == []
    assert [name for name in _REASONS if not _named(name, "refused")] == []


def test_its_tests_exist():
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "engine").glob("test_*.py")}
    for name in re.findall(r"`(test_\w+\.py)", PAGE):
        assert name in files
    for name in re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", PAGE):
        assert any(f"def {name}(" in text for text in files.values()), name
