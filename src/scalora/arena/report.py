"""One self-contained page about a comparison, and the same table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from ..common.files import write_text
from . import figures
from .plan import Comparison, Contender
from .statistics import (
    Results,
    chosen_rates,
    compare,
    curve_verdict,
    final_runs,
    final_values,
    over_rates,
    primary,
    relative_cost,
    summarize,
)

COLUMNS = (
    "contender", "lr", "metric", "vs LoRA (95 %)", "wins", "verdict", "trainable", "time/LoRA", "memory/LoRA",
    "on disk",
)  # fmt: skip


class Row(NamedTuple):
    """One contender's line, as text in the order of ``COLUMNS``."""

    cells: tuple[str, ...]


def table(comparison: Comparison, results: Results) -> tuple[str, list[Row]]:
    """A caption and a line per contender that has finished at least one final seed, in the order they were named."""
    metric, higher = primary(results)
    rates = chosen_rates(results, comparison)
    values = {c: final_values(results, c, rates.get(c), metric) for c in comparison.contenders}
    base = _baseline(comparison)
    rows = [
        Row(_cells(results, c, rates.get(c), values[c], base, rates.get(base), values.get(base, {}), metric, higher))
        for c in comparison.contenders
        if values[c]
    ]
    better = "higher is better" if higher else "lower is better"
    return f"test {metric} ({better}): mean ± standard error over seeds", rows


def write_report(comparison: Comparison, results: Results, content: dict[str, Any], path: Path) -> None:
    """Write the page."""
    metric, _ = primary(results)
    chosen = chosen_rates(results, comparison)
    caption, rows = table(comparison, results)
    failures = [(trial, r["error"]) for trial, r in sorted(results.items()) if "error" in r]
    title = f"{comparison.recipe.model} on {comparison.recipe.task.data.train}"
    parts = [
        f"<h1>{escape(title)}: {len(comparison.contenders)} methods compared</h1>",
        f"<p>{_progress(comparison, results, chosen)}</p><pre>{escape(content['command'])}</pre>",
    ]
    if comparison.curve:
        parts.append(f"<h2>Does rank matter here?</h2><p>{escape(curve_verdict(results, comparison.curve))}</p>")
        parts.append(figures.rank_curve(results, comparison.curve, metric))
    parts.append(f"<h2>Result</h2>{_html_table(COLUMNS, [row.cells for row in rows], caption)}")
    parts.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in in_words(rows))}</ul>")
    if comparison.fixed is None:
        parts.append(f"<h2>Validation {escape(metric)} over the learning rate</h2>")
        parts.append(figures.sensitivity(results, comparison.contenders, metric))
        heads = ("contender", *(f"{rate:g}" for rate in sorted(comparison.rates)))
        parts.append(
            _html_table(heads, [_over_rates(results, c, comparison, metric) for c in comparison.contenders], "")
        )
    pictures = [("Learning curves", figures.learning_curves(results, chosen))]
    if comparison.ranks:
        pictures.append(("Rank of the accumulated update", figures.ranks(results, chosen)))
    pictures.append(("Quality over cost", figures.quality_over_cost(results, chosen, _baseline(comparison), metric)))
    for heading, picture in pictures:
        parts.append(f"<h2>{escape(heading)}</h2>{picture}")
    if failures:
        lines = [(t.stage, str(t.contender), f"{t.lr:g}", str(t.seed), reason) for t, reason in failures]
        parts.append(f"<h2>Failed trials</h2>{_html_table(('stage', 'contender', 'lr', 'seed', 'reason'), lines, '')}")
    environment = content["environment"]
    parts.append(
        f"<h2>Measured with</h2><p>{escape(str(environment['processor']))}, {environment['threads']} threads, "
        f"GPU {escape(str(environment['gpu']))}, revision {escape(str(content['git_revision']))}; "
        f"{escape(', '.join(f'{k} {v}' for k, v in environment['versions'].items()))}</p>"
    )
    write_text(path, _PAGE.format(title=escape(title), body="\n".join(parts)))


def in_words(rows: Sequence[Row]) -> list[str]:
    """A sentence per contender on its difference to LoRA."""
    place = {name: i for i, name in enumerate(COLUMNS)}
    return [
        f"{row.cells[place['contender']]}: {row.cells[place['vs LoRA (95 %)']]} against LoRA, "
        f"{row.cells[place['verdict']]} ({row.cells[place['wins']]} seeds won)."
        for row in rows
        if row.cells[place["verdict"]]
    ]


def _cells(
    results: Results, contender: Contender, lr: float | None, values: dict[int, float],
    base: Contender, base_lr: float | None, base_values: dict[int, float], metric: str, higher: bool,
) -> tuple[str, ...]:  # fmt: skip
    ours, theirs = (list(final_runs(results, c, rate).values()) for c, rate in ((contender, lr), (base, base_lr)))
    m = summarize(list(values.values()))
    error = f" ± {m.error:.4f}" if isfinite(m.error) else ""
    difference = compare(values, base_values, higher_is_better=higher) if contender != base else None
    gain, wins, verdict = "", "", ""
    if difference:
        interval = f" [{difference.low:+.4f}, {difference.high:+.4f}]" if isfinite(difference.low) else ""
        gain, wins, verdict = (
            f"{difference.value:+.4f}{interval}",
            f"{difference.wins}/{difference.n}",
            difference.verdict,
        )

    def ratio(key: str) -> str:
        cost = relative_cost(ours, theirs, key)
        return "" if cost is None else f"{cost:.2f}"

    return (
        str(contender), f"{lr:g}", f"{m.value:.4f}{error} (n={m.n})", gain, wins, verdict,
        f"{ours[0]['trainable_parameters']:,}", ratio("seconds_per_step"), ratio("peak_memory_bytes"),
        f"{mean(run['adapter_bytes'] for run in ours) / 2**20:.1f} MiB",
    )  # fmt: skip


def _over_rates(results: Results, contender: Contender, comparison: Comparison, metric: str) -> tuple[str, ...]:
    """Mean validation metric at each rate; empty where a trial is missing or failed."""
    found = over_rates(results, contender, metric)
    return (str(contender), *(f"{mean(found[r]):.4f}" if r in found else "" for r in sorted(comparison.rates)))


def _baseline(comparison: Comparison) -> Contender:
    """LoRA at the recipe's rank, or else the first LoRA there is."""
    same = Contender("lora", comparison.recipe.method.rank)
    others = [c for c in comparison.contenders if c.method == "lora"]
    return same if same in comparison.contenders or not others else others[0]


def _progress(comparison: Comparison, results: Results, chosen: dict[Contender, float]) -> str:
    planned = [*comparison.tuning(), *comparison.final(chosen)]
    done = sum(trial in results for trial in planned)
    by = f", by its {comparison.chosen_by}" if comparison.chosen_by else ""
    rates = f"Every method's rate was chosen on validation data{by}, on one grid."
    return f"{done} of {len(planned)} trials done. {rates if comparison.fixed is None else 'The rates were given.'}"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><tr>{titles}</tr>{lines}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }}
caption {{ text-align: left; color: #666; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; }}
pre {{ background: #f5f5f5; padding: .6rem; white-space: pre-wrap; }}
svg {{ max-width: 100%; height: auto; }}
</style></head><body>
{body}
</body></html>
"""
