"""The pages that show results: docs/results.md, and the table in README between its markers.

python -m benchmarks.pages

Words stand in benchmarks/notes.md; a line ``[[what …]]`` there becomes a table, a command or a picture. Pictures that
``scalora reproduce`` has drawn into benchmarks/results since are moved to docs/images.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean

from scalora.arena.contender import Contender, parse_contender
from scalora.arena.plan import Chosen
from scalora.arena.results import ComparisonRecord, read_comparison, read_results
from scalora.arena.statistics import over_rates, primary, tuned
from scalora.arena.table import ComparisonTable, TextTable, comparison_table
from scalora.common.disk_layout import RESULTS
from scalora.common.files import write_text
from scalora_papers.run import read_experiment

from .gpu.page import tables as on_device

ROOT = Path(__file__).parents[1]
FOLDER = Path("benchmarks/results")
NOTES, PAGE = ROOT / "benchmarks" / "notes.md", ROOT / "docs" / "results.md"
README, IMAGES = ROOT / "README.md", ROOT / "docs" / "images"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# In docs/images → where `scalora reproduce` draws it.
FIGURES = {
    "fig1": "fig1/fig1", "fig2": "fig2/fig2", "fig3": "fig3/fig3", "complexity": "table4/complexity",
    "sensitivity": "sensitivity/sensitivity", "alpha-theory": "alpha-theory/accuracy",
}  # fmt: skip
# A task in words, its folder, and who stands for ScaLoRA-I and for white refreshes there; None: it has not run.
OVERVIEW = (
    ("random pairs, SmolLM2, rank 8", "smollm2-recall", None, "white-refresh@8"),
    ("Python, byte-level transformer, rank 8", "byte-python-8", None, "white-refresh@8"),
    ("turned digits, dense network, rank 2", "digits", "scalora-i@2", "white-refresh@2"),
    ("GSM8K, SmolLM2, rank 2", "smollm2-gsm8k", "scalora-i@2", "white-refresh:refresh=37@2"),
    ("headlines, MiniLM, rank 4", "minilm-sarcasm", "scalora-i@4", "white-refresh@4"),
    ("MRPC, MiniLM, rank 4", "reproduce/table1/MRPC", "scalora-i@4", None),
    ("ARC-Easy, SmolLM2, rank 4", "smollm2-arc-easy", "scalora-i@4", "white-refresh@4"),
)
OURS = "scalora-i", "white-refresh"
STEPS = "overhead/smollm2-bf16.json"


def pages() -> dict[Path, str]:
    """Each page and what should stand in it; README as it is where it has no markers."""
    notes = NOTES.read_text(encoding="utf-8")
    page = re.sub(r"^\[\[(\w+) ?(.*)\]\]$", lambda found: PARTS[found[1]](*found[2].split()), notes, flags=re.M)
    readme = README.read_text(encoding="utf-8")
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        readme = f"{before}{begin}\n\n{overview()}\n\n{end}{after}"
    return {PAGE: page, README: readme}


def overview() -> str:
    """LoRA beside this project's methods, a row per task, and what a step takes."""
    rows = []
    for task, folder, *names in OVERVIEW:
        table = _table(folder)
        found = {str(row.contender): row for row in table.rows}
        lora = found[str(table.baseline)].quality
        score = f"test {_metric(table)} {'↑' if table.higher_is_better else '↓'}"
        cells = []
        for name, heading in zip(names, OURS, strict=True):
            if name is None:
                cells.append("–")
                continue
            ours, own = found[name], name.rpartition("@")[0]
            assert ours.difference
            other = "" if own == heading else f" (`{own}`)"
            cells.append(f"{ours.quality.value:.3f} ± {ours.quality.error:.3f}{other}, {ours.difference.verdict}")
        seeds = max(found[name].difference.n for name in names if name)  # pyright: ignore[reportOptionalMemberAccess]
        rows.append([f"{task}, {seeds} seeds: {score}", f"{lora.value:.3f} ± {lora.error:.3f}", *cells])
    steps = map(_step, OURS)
    rows.append(["time of a step, SmolLM2, bf16, PEFT's LoRA being 1 ↓", "1.00", *steps])
    return _untitled(TextTable("", ["task", "LoRA", *(f"`{name}`" for name in OURS)], rows))


def _step(name: str) -> str:
    """What a step of a method takes of PEFT's LoRA's, and whether the quartiles hold 1."""
    step = json.loads((ROOT / FOLDER / STEPS).read_text(encoding="utf-8"))["methods"][name]
    low, high = step["quartiles"]
    verdict = "within noise" if low <= 1 <= high else "worse" if low > 1 else "better"
    return f"{step['ratio']:.2f}, {verdict}"


def comparison(folder: str) -> str:
    """Command, how many differ from LoRA, and a row per contender, the best first."""
    table = _table(folder).best_first()
    counts = Counter(row.difference.verdict for row in table.rows if row.difference)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("better", "worse", "within noise"))
    better = "higher" if table.higher_is_better else "lower"
    text = table.text("contender", "setting", "lr", "quality", "seeds", "difference", "verdict", "time", rates=True)
    verdict = f"Against `{table.baseline}`: {said}. The score is {_metric(table)}; {better} is better."
    return f"{command(folder)}\n\n{verdict}\n\n{_untitled(text)}"


def against(folder: str, baseline: str, *shown: str) -> str:
    """What some contenders, or all, gain on one of them."""
    record = _record(folder)
    table = comparison_table(record.comparison, record.results, parse_contender(baseline, 0)).best_first()
    rows = [row for row in table.rows if row.difference and (not shown or str(row.contender) in shown)]
    kept = replace(table, rows=rows)
    return _untitled(kept.text("contender", "difference", "wins", "verdict"))


def seeds(folder: str, rate: str) -> str:
    """The validation metric at one rate, tuning seed by tuning seed."""
    record, metric = _record(folder), _table(folder).metric
    columns, rows = record.comparison.tuning_seeds, []
    for c in record.comparison.contenders:
        found = tuned(record.results, [c], metric).get(Chosen(c, float(rate)), {})  # a seed that failed is missing
        rows.append([str(c), *(f"{found[seed]:.3f}" if seed in found else "failed" for seed in columns)])
    return _untitled(TextTable("", ["method", *map(str, columns)], rows))


def tuning(folder: str) -> str:
    """Command, and the validation metric of every setting at every rate, means over seeds; the best setting first."""
    record, (metric, higher) = _record(folder), primary(_record(folder).results)
    found: dict[Contender, dict[float, float]] = {}
    for setting in dict.fromkeys(each for c in record.comparison.contenders for each in record.comparison.settings[c]):
        if values := over_rates(record.results, setting, metric):
            found[setting] = {rate: mean(of) for rate, of in values.items()}
    rates = sorted({rate for values in found.values() for rate in values})
    best = max if higher else min
    order = sorted(found, key=lambda setting: best(found[setting].values()), reverse=higher)
    rows = [[str(c), *(f"{found[c][rate]:.4f}" if rate in found[c] else "" for rate in rates)] for c in order]
    return f"{command(folder)}\n\n{_untitled(TextTable('', ['method', *(f'{rate:g}' for rate in rates)], rows))}"


def tables(folder: str) -> str:
    """Command and tables of a paper's experiment."""
    record = read_experiment(read_results(ROOT / FOLDER / folder), FOLDER / folder / RESULTS)
    return "\n\n".join([command(folder), *(table.markdown().strip() for table in record.tables)])


def command(folder: str) -> str:
    """How it was called, and where its numbers lie."""
    called = read_results(ROOT / FOLDER / folder)["command"]
    return f"    {called}\n\nNumbers: `{FOLDER / folder / RESULTS}`."


def figure(name: str, *words: str) -> str:
    """A picture of docs/images."""
    return f"![{' '.join(words)}](images/{name}.png)"


def gpu() -> str:
    """What ``python -m benchmarks.gpu`` has measured on a device; so far it may not have run on any."""
    file = ROOT / FOLDER / "gpu.json"
    return on_device(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else "Not measured yet."


PARTS = {part.__name__: part for part in (overview, comparison, against, seeds, tuning, tables, command, figure, gpu)}


def main() -> None:
    for name, place in FIGURES.items():
        drawn = ROOT / FOLDER / "reproduce" / f"{place}.png"
        if drawn.exists():
            drawn.replace(IMAGES / f"{name}.png")
    for path, text in pages().items():
        write_text(path, text)


@cache
def _record(folder: str) -> ComparisonRecord:
    return read_comparison(ROOT / FOLDER / folder)


def _table(folder: str) -> ComparisonTable:
    return comparison_table(_record(folder).comparison, _record(folder).results)


def _metric(table: ComparisonTable) -> str:
    return table.metric.replace("_", " and ")


def _untitled(table: TextTable) -> str:
    return TextTable("", table.columns, table.rows).markdown().strip()


if __name__ == "__main__":
    main()
