"""PEFT's own tests of LoRA, on models that ScaLoRA has trained: what fails there that does not fail without it?

    python -m benchmarks.studies.peft_suite ../peft --accumulate adapter,base

Takes a checkout of PEFT near the version that is installed, with what its tests import (diffusers, parameterized).
Runs tests/test_custom_models.py as it is, then with the plugin beside this file. Writes
benchmarks/results/peft_suite.json: how many pass, what fails with ScaLoRA only, by message, and what was refused.
docs/compatibility.md says why of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from .. import record
from .peft_plugin import PLAIN


def main() -> None:
    """Run the tests without and with ScaLoRA; print and store what differs."""
    parser = record.parser(__doc__, "peft_suite.json")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--accumulate", default="adapter", help="stores, comma-separated")
    parser.add_argument("--only", default="", help="pytest's -k")
    given = parser.parse_args()
    tests = given.checkout.resolve() / "tests" / "test_custom_models.py"
    plain = run(tests, PLAIN, given.only)
    if not plain["outcomes"]:
        parser.error(f"no test of LoRA ran in {tests}: pytest says above what is missing")
    result = {"plain": dict(Counter(map(outcome, plain["outcomes"].values())))}
    for store in given.accumulate.split(","):
        result[store] = compare(plain, run(tests, store, given.only))
        print(store, json.dumps(result[store], indent=1, ensure_ascii=False))
        record.write(given.output, result)


def run(tests: Path, accumulate: str, only: str) -> dict[str, Any]:
    """Outcomes by test, attachments and refusals of one run of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "pytest", "-q", "--tb=no", "-W", "ignore", "-p", "no:cacheprovider",
            "-p", f"{__package__}.peft_plugin", "--accumulate", accumulate, "--report", str(report), str(tests),
        ]  # fmt: skip
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # what is not there is waited for in vain
        subprocess.run([*command, *(["-k", only] if only else [])], env=offline, check=False)
        return json.loads(report.read_text(encoding="utf-8"))


def compare(plain: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Counts, and how many cases of which tests fail with ScaLoRA only, by message."""
    differ: dict[str, Counter[str]] = {}
    for test, what in found["outcomes"].items():
        if outcome(what) == "failed" != outcome(plain["outcomes"].get(test, "passed")):
            differ.setdefault(what, Counter())[test.partition("[")[0]] += 1
    return {
        "outcomes": dict(Counter(map(outcome, found["outcomes"].values()))),
        "attached": found["attached"],
        "refused": found["refused"],
        "only_with_scalora": differ,
    }


def outcome(what: str) -> str:
    return what if what in ("passed", "skipped") else "failed"


if __name__ == "__main__":
    main()
