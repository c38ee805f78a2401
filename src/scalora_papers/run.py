"""Running an experiment: its folder, what is left in it, and how that is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scalora.arena.table import TextTable
from scalora.common.disk_layout import RESULTS, TABLES
from scalora.common.environment import environment, git_revision
from scalora.common.errors import ScaloraError
from scalora.common.files import check_writable, write_json, write_text
from scalora.runs.plots import save

from .base import Experiment, Outcome, Setting

_KEPT_LEVELS = 3  # of results.json that have lines of their own


class ExperimentRecord(NamedTuple):
    """What there is to show of an experiment that was run."""

    name: str
    summary: str
    command: str
    tables: list[TextTable]
    remarks: list[str]


def run_experiment(experiment: Experiment, setting: Setting, *, resume: bool = False) -> Outcome:
    """Run it and leave results.json, tables.md and its figures in ``setting.folder``.

    Args:
        experiment: what is run.
        setting: at which scale, on what data, where to.
        resume: continue in a folder that holds something already.

    Raises:
        ScaloraError: the folder takes no writing or is not empty (without ``resume``), or the experiment's own.
    """
    folder = setting.folder
    check_writable(folder, "--output")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ScaloraError(f"--output {folder} holds something already: add --resume to continue it, or name another")
    outcome = experiment.run(setting)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in outcome.figures.items():
        save(figure, folder / f"{name}.png")
    content = {
        "experiment": experiment.name,
        "summary": experiment.summary,
        "scale": setting.scale,
        "command": setting.command,
        "git_revision": git_revision(),
        "environment": environment(),
        "tables": [vars(table) for table in outcome.tables],
        "remarks": outcome.remarks,
        **outcome.content,
    }
    write_json(folder / RESULTS, content, depth=_KEPT_LEVELS)
    write_tables(read_experiment(content, folder / RESULTS), folder / TABLES)
    return outcome


def read_experiment(content: Mapping[str, Any], file: Path) -> ExperimentRecord:
    """What results.json of an experiment holds to show.

    Raises:
        ScaloraError: it was written by a version that did not keep its tables; the message names `file`.
    """
    try:
        tables = [TextTable(table["title"], table["columns"], table["rows"]) for table in content["tables"]]
        name, summary, command = content["experiment"], content["summary"], content["command"]
        return ExperimentRecord(name, summary, command, tables, content["remarks"])
    except (KeyError, TypeError) as error:
        raise ScaloraError(
            f"{file} holds no tables, as those of earlier versions: reproduce NAME --resume --output {file.parent} "
            "writes it anew"
        ) from error


def write_tables(record: ExperimentRecord, path: Path) -> None:
    """The tables and remarks as Markdown."""
    parts = [f"# {record.name}: {record.summary}", f"`{record.command}`"]
    parts += [table.markdown() for table in record.tables]
    parts += ["\n".join(f"- {remark}" for remark in record.remarks)]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")


def default_folder(name: str, scale: str) -> Path:
    return Path("runs") / "reproduce" / f"{name}-{scale}"
