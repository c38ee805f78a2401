"""The table of a comparison: named figures, and the same ones on a page, in Markdown and on a screen."""

import dataclasses
import io

import pytest
from rich.console import Console

from helpers import comparisons
from scalora.arena.contender import Contender
from scalora.arena.table import EVERY_FIELD, TextTable, comparison_table


@pytest.fixture
def found(tmp_path):
    comparison = comparisons.small(tmp_path)
    return comparison_table(comparison, comparisons.run_all(comparison))


def test_every_figure_has_a_name(found):
    lora, scalora, _ = found.rows
    assert (found.metric, found.higher_is_better, found.baseline) == ("accuracy", True, lora.contender)
    assert (lora.contender, lora.lr, lora.quality.value) == (Contender("lora", 2), 1e-2, pytest.approx(0.605))
    assert lora.difference is None
    assert scalora.difference.value == pytest.approx(0.05)
    assert (scalora.time, scalora.memory, scalora.trainable, scalora.held, scalora.disk) == (1, 1, 10, 160, 5)
    assert scalora.validation == {1e-3: [pytest.approx(0.55)], 1e-2: [pytest.approx(0.65)]}
    assert [str(row.contender) for row in found.best_first().rows] == ["scalora@2", "lora@2", "lora@4"]
    assert [line.split(":")[0] for line in found.in_words()] == ["scalora@2", "lora@4"]


def test_another_baseline_turns_the_difference_round(tmp_path):
    comparison = comparisons.small(tmp_path)
    table = comparison_table(comparison, comparisons.run_all(comparison), Contender("scalora", 2))
    assert table.rows[0].difference.value == pytest.approx(-0.05)
    assert table.rows[1].difference is None
    assert "gain over scalora@2 (95 %), plus is better" in table.text("difference").columns


def test_columns_are_asked_for_by_name(found):
    shown = found.text("contender", "verdict", rates=True)
    assert shown.columns == ["method", "verdict", "0.001", "0.01"]
    assert shown.rows[1] == ["scalora@2", "better", "0.550", "0.650"]
    assert len(found.text(*EVERY_FIELD).columns) == len(EVERY_FIELD) - 1  # nothing but a rate was chosen
    with pytest.raises(KeyError):
        found.text("verdikt")


def test_small_sizes_and_shared_machines_are_shown_as_what_they_are(found):
    few = [dataclasses.replace(row, held=139_376.0, disk=5_000.0, waited=0.4) for row in found.rows]
    shown = dataclasses.replace(found, rows=few).text("held", "disk", "time")
    assert shown.rows[0] == ["0.1 MiB", "4.9 KiB", "1.00 (machine shared)"]
    assert found.text("held", "disk", "time").rows[0] == ["0.2 KiB", "5 B", "1.00"]


def test_three_renderers_show_one_table():
    table = TextTable("a <b>", ["x", "y"], [["[1]", "2|3"]])
    assert table.markdown() == "**a <b>**\n\n| x | y |\n| --- | --- |\n| [1] | 2∣3 |\n"
    assert "<caption>a &lt;b&gt;</caption><tr><th>x</th><th>y</th></tr><tr><td>[1]</td>" in table.html()
    console = Console(file=io.StringIO(), width=60)
    console.print(table.terminal())
    assert all(text in console.file.getvalue() for text in ("a <b>", "[1]", "2|3"))
