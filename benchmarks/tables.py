"""The tables of docs/results.md: ``python -m benchmarks.tables benchmarks/results/NAME [CONTENDER]``.

Test metric of every contender, paired difference to LoRA, and validation metric over the learning rates of the grid.
With a contender: its paired difference to every other.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scalora.arena.statistics import compare, relative_cost


def markdown(folder: Path) -> str:
    """One table, contenders in the order of their first trial, LoRA's difference to itself left out."""
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    trials = [trial for trial in content["trials"] if "error" not in trial]
    metric, higher = trials[0]["primary"], trials[0]["higher_is_better"]
    finals: dict[str, dict[int, float]] = defaultdict(dict)
    tuned: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for trial in trials:
        name, value = trial["contender"], trial["after"][metric]
        if trial["stage"] == "tune":
            tuned[name][trial["lr"]].append(value)
        elif trial["lr"] == content["chosen"].get(name):
            finals[name][trial["seed"]] = value
            runs[name].append(trial)
    base = next(name for name in finals if name == f"lora@{content['recipe']['method']['rank']}")
    rates = sorted(content["rates"])
    lines = [
        f"| method | lr | test {metric} | against LoRA (95 %) | verdict | s/step | "
        + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (6 + len(rates)) + "|",
    ]  # fmt: skip
    order = sorted(finals, key=lambda name: mean(finals[name].values()), reverse=higher)
    for name in order:
        values = list(finals[name].values())
        error = f" ± {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        difference = compare(finals[name], finals[base], higher_is_better=higher) if name != base else None
        gain = f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]" if difference else ""
        over = " | ".join(f"{mean(tuned[name][rate]):.3f}" if rate in tuned[name] else "" for rate in rates)
        verdict = difference.verdict if difference else ""
        cost = relative_cost(runs[name], runs[base], "seconds_per_step")
        chosen = f"{content['chosen'][name]:g}"
        cells = [name, chosen, f"{mean(values):.4f}{error}", gain, verdict, "" if cost is None else f"{cost:.2f}", over]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against(folder: Path, ours: str) -> str:
    """What one contender gains over each other on the test split, in pairs of one seed."""
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    finals: dict[str, dict[int, float]] = defaultdict(dict)
    for trial in content["trials"]:
        if (
            trial["stage"] == "final"
            and "error" not in trial
            and trial["lr"] == content["chosen"].get(trial["contender"])
        ):
            finals[trial["contender"]][trial["seed"]] = trial["after"][trial["primary"]]
    higher = content["trials"][0]["higher_is_better"]
    lines = [f"| {ours} against | difference (95 %) | standard errors | seeds won | verdict |", "|---|---|---|---|---|"]
    for name in sorted(finals, key=lambda name: mean(finals[name].values()), reverse=higher):
        if name == ours:
            continue
        d = compare(finals[ours], finals[name], higher_is_better=higher)
        if d is None:  # too few seeds in common
            continue
        pairs = [finals[ours][seed] - finals[name][seed] for seed in finals[ours] if seed in finals[name]]
        error = stdev(pairs) / len(pairs) ** 0.5
        errors = abs(d.value) / error if error else 0.0  # the same runs under two names
        gain = f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
        lines.append(f"| {name} | {gain} | {errors:.1f} | {d.wins} of {d.n} | {d.verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(against(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 2 else markdown(Path(sys.argv[1])))
