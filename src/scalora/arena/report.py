"""One self-contained page about a comparison."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..common.files import write_text
from . import figures
from .contender import Contender
from .extending import edge_sentence
from .plan import Chosen, Comparison, Trial
from .pruning import given_up_sentence
from .results import ComparisonRecord
from .statistics import Results, choose_setting, in_order, over_rates
from .table import EVERY_FIELD, TextTable, comparison_table, over_seeds, setting_text
from .verdict import COSTS, ranking_table, recommendation


def write_report(record: ComparisonRecord, path: Path) -> None:
    """Write the page."""
    comparison, results, chosen = record.comparison, record.results, record.chosen
    table = comparison_table(comparison, results)
    metric = table.metric
    failures = [(trial, r["error"]) for trial, r in in_order(results) if "error" in r]
    title = f"{comparison.recipe.model} on {comparison.recipe.task.data.train}"
    parts = [
        f"<h1>{escape(title)}: {len(comparison.contenders)} methods compared</h1>",
        f"<p>{_progress(comparison, results, chosen)}</p><pre>{escape(record.command)}</pre>",
    ]
    ground = record.admission
    parts.append(f"<h2>Does rank matter here?</h2><p>{escape(ground.sentence)}</p>")
    if ground.points:
        parts.append(figures.rank_curve(ground.points, metric))
    parts.append(f"<h2>What to take</h2><p>{escape(recommendation(table))}</p>")
    parts.append(f"<h2>Result</h2>{table.text(*EVERY_FIELD).html()}")
    parts.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in table.in_words())}</ul>")
    parts.append(f"<h2>Ranking</h2>{ranking_table(table).html()}<p>{escape(_TIES)}</p>")
    pictures = [figures.quality_over_cost(table, cost) for cost in COSTS]
    parts.append(f"<h2>Quality over cost</h2>{''.join(pictures)}<p>{escape(_FRONT)}</p>")
    if comparison.fixed is None:
        parts.append(f"<h2>Validation {escape(metric)} over the learning rate</h2>")
        parts.append(figures.sensitivity(results, chosen, metric))
        parts.append(_over_rates(comparison, results, chosen, metric).html())
        said = filter(None, (edge_sentence(comparison, results), given_up_sentence(results)))
        parts.extend(f"<p>{escape(sentence)}</p>" for sentence in said)
        if any(len(comparison.settings[c]) > 1 for c in comparison.contenders):
            parts.append(f"<h2>Validation {escape(metric)} over the settings</h2>")
            parts.append(_over_settings(comparison, results, metric).html())
    pictures = [("Learning curves", figures.learning_curves(results, chosen))]
    if comparison.ranks:
        pictures.append(("Rank of the accumulated update", figures.ranks(results, chosen)))
    for heading, picture in pictures:
        parts.append(f"<h2>{escape(heading)}</h2>{picture}")
    if failures:
        lines = [(t.stage, str(t.contender), f"{t.lr:g}", str(t.seed), reason) for t, reason in failures]
        shown = TextTable("", ("stage", "method", "lr", "seed", "reason"), lines)
        parts.append(f"<h2>Failed trials</h2>{shown.html()}")
    environment = record.environment
    parts.append(
        f"<h2>Measured with</h2><p>{escape(str(environment['processor']))}, {environment['threads']} threads, "
        f"GPU {escape(str(environment['gpu']))}, revision {escape(str(record.git_revision))}; "
        f"{escape(', '.join(f'{k} {v}' for k, v in environment['versions'].items()))}</p>"
    )
    write_text(path, _PAGE.format(title=escape(title), body="\n".join(parts)))


def _over_rates(comparison: Comparison, results: Results, chosen: dict[Contender, Chosen], metric: str) -> TextTable:
    """Mean validation metric at each rate, also of contenders without a final run; empty where all trials failed."""
    rates, rows = sorted({*comparison.rates, *(choice.lr for choice in chosen.values())}), []
    for contender in comparison.contenders:
        found = over_rates(results, chosen[contender].contender, metric) if contender in chosen else {}
        usual = len(comparison.tuning_seeds)
        rows.append([str(contender), *(over_seeds(found.get(rate, ()), usual, 4) for rate in rates)])
    return TextTable("", ["method", *(f"{rate:g}" for rate in rates)], rows)


def _over_settings(comparison: Comparison, results: Results, metric: str) -> TextTable:
    """The best rate of every setting that was tried, and its mean validation metric."""
    rows = []
    for contender in comparison.contenders:
        for setting in comparison.settings[contender]:
            best = choose_setting(results, [setting], comparison.chosen_by)
            if best is None:
                continue
            value = over_seeds(over_rates(results, setting, metric)[best.lr], len(comparison.tuning_seeds), 4)
            rows.append([str(contender), setting_text(comparison.varied(contender, best)), f"{best.lr:g}", value])
    return TextTable("", ["method", "setting", "its best lr", metric], rows)


def _progress(comparison: Comparison, results: Results, chosen: dict[Contender, Chosen]) -> str:
    settings = {setting for c in comparison.everyone for setting in comparison.settings[c]}
    added = (trial for trial in results if trial.stage == "tune" and trial.contender in settings)
    planned = set[Trial]().union(comparison.tuning(), comparison.final(chosen), added)  # beyond the grid, or again
    done = sum(trial in results for trial in planned)
    by = f", by its {comparison.chosen_by}" if comparison.chosen_by else ""
    alphas = f", each at alpha {', '.join(f'{a:g}' for a in comparison.alphas)}" if comparison.alphas else ""
    rates = f"Every method's rate was chosen on validation data{by}, on one grid{alphas}."
    return f"{done} of {len(planned)} trials done. {rates if comparison.fixed is None else 'The rates were given.'}"


_TIES = (
    "One method is better than another by more than noise where their paired difference over seeds has a 95 % interval "
    "above zero. Two of which neither is better cannot be told apart. A place is one more than there are methods that "
    "are better. With many methods some intervals miss by chance."
)
_FRONT = (
    "Large marks and the line are the Pareto front, by means: no other method is both at least as good and at least as "
    "cheap. Costs are shown for methods that ran on hardware that the baseline ran on too."
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }}
caption {{ text-align: left; color: #666; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; }}
pre {{ background: #f5f5f5; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
figure {{ margin: 0; overflow-x: auto; }}
svg {{ max-width: 100%; min-width: 36rem; height: auto; }}
@media print {{
  body {{ margin: 0; max-width: none; font-size: 11px; }}
  table {{ display: table; font-size: 9px; }}
  th, td {{ padding: .1rem .3rem; }}
  figure, tr {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
  svg {{ min-width: 0; }}
}}
</style></head><body>
{body}
</body></html>
"""
