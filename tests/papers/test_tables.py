"""The experiments made of comparisons, with trials faked: what is asked for, and what is made of the answers."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scalora import ScaloraError
from scalora.arena import run
from scalora.arena.plan import Contender, shared_parts
from scalora.cli import app
from scalora.runs.recipe import load_recipe
from scalora_papers import Setting, all_experiments, find_experiment, sensitivity
from scalora_papers.published import COMMONSENSE_MEANS, COMMONSENSE_SETS, GLUE, GLUE_SETTINGS
from scalora_papers.run import run_experiment
from scalora_papers.table1_glue import small_recipe
from scalora_papers.table2_commonsense import COMMONSENSE_CONTENDERS, commonsense_problem

RECIPES = Path(__file__).parent.parent.parent / "recipes"

# As printed in the paper's last column.
GLUE_MEANS = {"full": 88.25, "lora": 88.13, "mora": 88.35, "hira": 88.46, "scalora": 88.98}


HERE = {"processor": "slow", "threads": 1, "gpu": None}


@pytest.fixture
def trials(monkeypatch):
    """Trials that take no time: ScaLoRA is better than LoRA by 2 points, HiRA fails at its highest rate."""
    seen = []

    def fake(comparison, trial, *_):
        seen.append((comparison, trial))
        if trial.contender.method == "hira" and trial.lr == max(comparison.rates):
            return {"error": "out of memory"}
        value = 0.7 + 0.02 * trial.contender.method.startswith("scalora") + 0.001 * trial.seed
        nll = 1 - value
        primary = {"completion": "exact_match", "vectors": "nll"}.get(comparison.recipe.task.kind, "accuracy")
        return {
            "after": {"accuracy": value, "exact_match": value, "nll": nll}, "primary": primary,
            "higher_is_better": primary != "nll", "ranks": [], "losses": [], "trainable_parameters": 1,
            "adapter_bytes": 1, "environment": HERE, "peak_memory_bytes": 100 + 50 * (trial.contender.method == "hira"),
            "seconds_per_step": 1 + trial.contender.method.startswith("scalora") / (1 + trial.seed // 2),
        }  # fmt: skip

    monkeypatch.setattr(run, "run_trial", fake)
    monkeypatch.setattr(run, "check_recipe", lambda recipe: ([], None))
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)
    return seen


@pytest.fixture
def data(tmp_path):
    """A data folder whose files are there, and empty: fake trials do not read them."""
    for name in ("glue/RTE/train.tsv", "glue/MRPC/train.tsv", "commonsense/ARC-Easy/train.json",
                 "commonsense/openbookqa/train.json", "math/gsm8k/train.jsonl"):  # fmt: skip
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    return tmp_path / "data"


def _setting(tmp_path, data=None, scale="small"):
    return Setting(scale, tmp_path / "out", data, lambda line: None, "scalora reproduce x")


@pytest.mark.parametrize("task", ["MRPC", "RTE"])
def test_table1_continues_the_arena_s_comparison(task, tmp_path):
    shipped = load_recipe(RECIPES / f"minilm-{task.lower()}.yaml")
    assert shared_parts(small_recipe(_setting(tmp_path, tmp_path), task)) == shared_parts(shipped)


@pytest.mark.parametrize(
    ("name", "problems", "best"),
    [
        ("table1", ["MRPC", "RTE"], "72.10 ± 0.06"),
        ("table2", ["ARC-e", "OBQA"], "72.10 ± 0.06"),
        ("table3", ["GSM8K"], "72.10 ± 0.06"),
        ("sensitivity", ["all"], "0.2790 ± 0.0006"),
    ],
)
def test_small_scale_tunes_scores_and_shows(trials, tmp_path, data, monkeypatch, name, problems, best):
    # Enough to see: the store takes a tenth of a second for every trial.
    monkeypatch.setattr(sensitivity, "_LIPSCHITZ", (None, 3.0))
    monkeypatch.setattr(sensitivity, "_INTERVALS", (1, 10))
    monkeypatch.setattr(sensitivity, "_CAPACITIES", (8,))
    monkeypatch.setattr(sensitivity, "_RANKS", (1, 2))
    monkeypatch.setattr(sensitivity.Sensitivity, "seeds", 3)
    outcome = run_experiment(find_experiment(name), _setting(tmp_path, data))
    table = outcome.tables[0]
    assert table.columns == ["method", *problems, "mean"]
    for row in table.rows:
        assert row[1].startswith(best) == row[0].startswith("scalora"), row
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["experiment"] == name
    assert set(stored) >= {*problems, "environment", "git_revision", "command"}
    assert best in (tmp_path / "out" / "tables.md").read_text()
    done = len(trials)
    run_experiment(find_experiment(name), _setting(tmp_path, data), resume=True)
    assert len(trials) == done  # nothing is run twice
    run_experiment(find_experiment(name), dataclasses.replace(_setting(tmp_path, data), retry=True), resume=True)
    again = trials[done:]
    assert {trial.contender.method for _, trial in again} == ({"hira"} if name in ("table1", "table2") else set())
    with pytest.raises(ScaloraError, match="--resume"):
        run_experiment(find_experiment(name), _setting(tmp_path, data))


def test_damaged_data_of_the_last_set_are_found_before_the_first_trial(trials, tmp_path, data, monkeypatch):
    def refuse(recipe):
        if "RTE" in recipe.task.data.train:
            raise ScaloraError("train.tsv, line 553: 1 fields")
        return [], None

    monkeypatch.setattr(run, "check_recipe", refuse)
    with pytest.raises(ScaloraError, match="line 553"):
        run_experiment(find_experiment("table1"), _setting(tmp_path, data))
    assert not trials
    assert not list((tmp_path / "out").rglob("*.sqlite3"))


def test_paper_scale_takes_the_published_rates(trials, tmp_path):
    outcome = run_experiment(find_experiment("table1"), _setting(tmp_path, scale="paper"))
    assert {trial.stage for _, trial in trials} == {"final"}
    rates = {(c.recipe.output.split("/")[-2], t.contender.method): c.trial_recipe(t, "x") for c, t in trials}
    for task, published in GLUE_SETTINGS.items():
        for method, rate in published.rates.items():
            training = rates[task, method].training
            assert training["learning_rate"] == pytest.approx(rate)
            assert training["num_train_epochs"] == published.epochs
    assert rates["RTE", "lora"].config == {"cls_dropout": 0.2}
    assert rates["SST-2", "lora"].config == {}
    assert [row[0] for row in outcome.tables[0].rows] == ["lora@4", "mora@4", "hira@4", "scalora@4"]
    assert outcome.tables[0].rows[0][1].endswith("(68.10)")


def test_fig3_measures_costs_only(trials, tmp_path, data):
    outcome = run_experiment(find_experiment("fig3"), _setting(tmp_path, data))
    rows = {row[0]: row[1:] for row in outcome.tables[0].rows}
    assert rows["lora@8"] == ["1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)", ""]
    assert rows["scalora@8"] == ["2.00 (1.50 to 2.00)", "1.00 (1.00 to 1.00)", "+0.01 GB"]
    assert [trial.seed for _, trial in trials] == sorted(trial.seed for _, trial in trials)  # round by round
    assert (tmp_path / "out" / "fig3.png").stat().st_size > 1000
    assert all(c.trial_recipe(t, "x").training["max_steps"] == 20 for c, t in trials)
    assert not any(c.ranks for c, _ in trials)  # measuring the rank takes memory of its own


def test_costs_are_compared_on_one_machine_only(trials, tmp_path, data, monkeypatch):
    fake = run.run_trial

    def run_trial(comparison, trial, *rest):
        elsewhere = {"environment": HERE | {"processor": "fast"}, "seconds_per_step": 0.1}
        return fake(comparison, trial, *rest) | (elsewhere if trial.seed == 2 and trial.contender.rank == 8 else {})

    monkeypatch.setattr(run, "run_trial", run_trial)
    (table,) = run_experiment(find_experiment("fig3"), _setting(tmp_path, data)).tables
    cells = {row[0]: row[1] for row in table.rows}
    assert (
        cells["lora@32"] == "1.00 (1.00 to 1.00)"
    )  # not ten times LoRA's at the seed for which LoRA went on elsewhere


def test_report_writes_an_experiment_s_tables_again(trials, tmp_path, data):
    run_experiment(find_experiment("fig3"), _setting(tmp_path, data))
    folder = tmp_path / "out"
    before = (folder / "tables.md").read_text()
    (folder / "tables.md").unlink()
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.stderr
    assert (folder / "tables.md").read_text() == before
    early = json.loads((folder / "results.json").read_text())
    del early["tables"]
    (folder / "results.json").write_text(json.dumps(early))
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 2
    assert "holds no tables" in result.stderr


def test_the_published_numbers_are_the_papers():
    for method, mean in GLUE_MEANS.items():
        assert sum(GLUE[method].values()) / len(GLUE_SETTINGS) * 100 == pytest.approx(mean, abs=0.01)
    assert max(COMMONSENSE_MEANS["LLaMA2-7B"].items(), key=lambda item: item[1]) == ("scalora-i", 0.7475)


def test_paper_scale_commonsense_rates_by_method(tmp_path):
    problem = commonsense_problem(_setting(tmp_path), "LLaMA3-8B", "HellaSwag")
    rates = {str(c): rate for c, rate in problem.fixed.items()}
    assert rates["lora@8"] == rates["relora@8"] == rates["lora-ga@8"] == 1e-4
    assert rates["hira@8"] == pytest.approx(1e-3 / 10)  # on the common grid, on which HiRA has ten times the rate
    assert rates["scalora@8"] == rates["scalora-i@8"] == 1e-4
    assert set(problem.fixed) == set(COMMONSENSE_CONTENDERS)


@pytest.mark.parametrize(
    ("name", "rows", "modules", "parameters"),
    [
        ("table1", 8, 72, 663_552),  # 0.67 M with a head for two labels
        ("table2", 16, 160, None),
        ("table3", 2, 240, None),
    ],
)
def test_paper_scale_is_planned_without_weights(tmp_path, name, rows, modules, parameters):
    plans = find_experiment(name).plan(_setting(tmp_path)).content["plans"]
    assert len(plans) == rows
    for plan in plans.values():
        assert plan["modules"] == modules
        assert plan["adapter_parameters"] == (parameters or plan["adapter_parameters"])
        assert plan["bytes"] > 2 * plan["parameters"]
        assert plan["tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tabel1"], "did you mean 'table1'"),
        (["table1", "--scale", "big"], "--scale is 'big'"),
        (["table1"], "--data is missing"),
        (["table1", "--data", "nowhere"], "no such folder"),
        (["table2", "--data", "."], "commonsense/<SET>/train.json"),
        (["sensitivity", "--plan"], "leave --plan out"),
        (["fig1", "--output", "/proc/nowhere"], "--output /proc/nowhere cannot be written to"),
    ],
)
def test_bad_input_gets_one_message_and_exit_code_2(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["reproduce", *arguments])
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_every_experiment_is_listed():
    listed = CliRunner().invoke(app, ["reproduce"]).output
    assert all(name in listed for name in all_experiments())
    assert {"fig2", "fig3", "table1", "table2", "table3", "sensitivity"} <= set(all_experiments())
    assert len(COMMONSENSE_SETS) == 8
    assert Contender("lora", 32) in COMMONSENSE_CONTENDERS
