"""What docs/results.md shows of a run on a device: ratios and memory, events, exactness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scalora.arena.table import TextTable

from ..cost.overhead import REFERENCE
from .rivals import METHODS


def tables(content: Mapping[str, Any]) -> str:
    """Of what :mod:`.command` has written."""
    parts = [
        f"    {content['command']}\n\nOn {content['device']}, torch {content['environment']['versions']['torch']}.",
        _steps(content["cells"]),
        _events(content["events"]),
        _exactness(content["exactness"]),
        *(f"- {each['what']} ({each['cell']}) failed: {each['error']}" for each in content["failures"]),
    ]
    return "\n\n".join(part.strip("\n") for part in parts)


def _steps(cells: list[dict[str, Any]]) -> str:
    measured = {name for cell in cells for name in cell["methods"]} - {REFERENCE}
    names = [name for name in METHODS if name in measured]
    columns = ["billions", "precision", "r", "tokens", "LoRA (PEFT), ms", *names]
    rows = [[*_place(cell), str(cell["tokens"]), *_ratios(cell["methods"], names)] for cell in cells]
    return TextTable("Ratio to PEFT's LoRA: time (memory)", columns, rows).markdown()


def _ratios(methods: Mapping[str, Any], names: list[str]) -> list[str]:
    if REFERENCE not in methods:
        return ["–"] * (1 + len(names))
    texts = [f"{1e3 * methods[REFERENCE]['median']:.1f}"]
    for name in names:
        row = methods.get(name)
        memory = "" if row is None or row["memory_ratio"] is None else f" ({row['memory_ratio']:.2f})"
        texts.append("–" if row is None else f"{row['ratio']:.2f}{memory}")
    return texts


def _events(events: list[dict[str, Any]]) -> str:
    columns = ["billions", "precision", "r", "method", "event", "ms", "synchronisations", "launches"]
    rows = [
        [
            *_place(row), row["method"], row["kind"], f"{row['milliseconds']:.2f}",
            *("–" if row[count] is None else str(row[count]) for count in ("synchronisations", "launches")),
        ]
        for row in events
    ]  # fmt: skip
    return TextTable("An event alone", columns, rows).markdown()


def _exactness(found: Mapping[str, Any]) -> str:
    columns = ["method", "by events", "by saving and loading", "greatest logit"]
    rows = [
        [name, *("–" if value is None else f"{value:.1e}" for value in (row["change"], row["reloaded"])),
         f"{row['greatest_logit']:.2f}"]
        for name, row in found.items()
    ]  # fmt: skip
    return TextTable("Greatest change of a float32 logit", columns, rows).markdown()


def _place(row: Mapping[str, Any]) -> list[str]:
    return [row["size"], row["precision"], str(row["rank"])]
