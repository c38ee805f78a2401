"""Running an experiment: its folder, and what is left in it."""

from __future__ import annotations

from pathlib import Path

from scalora.common.disk_layout import RESULTS
from scalora.common.environment import environment, git_revision
from scalora.common.errors import ScaloraError
from scalora.common.files import check_writable, write_json, write_text
from scalora.runs.plots import save

from .base import Experiment, Outcome, Setting


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
    parts = [f"# {experiment.name}: {experiment.summary}", f"`{setting.command}`"]
    parts += [table.markdown() for table in outcome.tables]
    parts += ["\n".join(f"- {remark}" for remark in outcome.remarks)]
    write_text(folder / "tables.md", "\n\n".join(part for part in parts if part) + "\n")
    write_json(
        folder / RESULTS,
        {
            "experiment": experiment.name,
            "scale": setting.scale,
            "command": setting.command,
            "git_revision": git_revision(),
            "environment": environment(),
            **outcome.content,
        },
    )
    return outcome


def default_folder(name: str, scale: str) -> Path:
    return Path("runs") / "reproduce" / f"{name}-{scale}"
