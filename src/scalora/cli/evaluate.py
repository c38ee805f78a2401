"""``scalora evaluate``: the score of a run, a checkpoint, an adapter, a model or an export, without training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..common.quiet import quiet
from .console import plain_console
from .guard import alone, guarded
from .train import live_watcher


def evaluate_verb(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A run, a checkpoint, an adapter, a model or an export.")],
    split: Annotated[
        str | None, typer.Option(help="test, validation or train; test by default, or what is held out in its place.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE", help="The recipe whose task counts; that of the run by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Other data, say: task.data.test=more.jsonl; repeatable."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model, if it is not where the run found it.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the scores and each row's prediction there, as JSON.")
    ] = None,
) -> None:
    """Score what was trained on held-out rows again, or on others."""
    with guarded():
        alone("evaluate")
        from ..common.errors import ScaloraError
        from ..common.files import check_writable, expand_user, write_json

        file = None if output is None else expand_user(output)
        if file is not None:
            if file.is_dir():
                raise ScaloraError(f"--output {file} is a folder: name the file to write, e.g. {file / 'scores.json'}")
            check_writable(file.parent, "--output")
        quiet()
        from ..runs.evaluate import evaluate_folder

        console = plain_console()
        watcher = live_watcher(console)
        with watcher.display:
            found = evaluate_folder(
                path, recipe=recipe, overrides=overrides or [], split=split, base=base, watcher=watcher
            )
            watcher.finish()
        table = Table(title=f"{found.rows} {found.split} rows", title_justify="left")
        table.add_column("metric")
        table.add_column("score", justify="right")
        if found.recorded is not None:
            table.add_column("after training", justify="right")
        for name, value in found.score.metrics.items():
            then = [] if found.recorded is None else [f"{found.recorded[name]:.4f}" if name in found.recorded else ""]
            table.add_row(name, f"{value:.4f}", *then)
        console.print(table)
        if found.score.truncated:
            console.print(f"cut to max_length: {found.score.truncated} sequences", highlight=False)
        if file is not None:
            write_json(
                file,
                {
                    "folder": str(Path(found.folder).resolve()),
                    "split": found.split,
                    "precision": found.precision._asdict(),
                    "metrics": found.score.metrics,
                    "primary": found.score.primary,
                    "higher_is_better": found.score.higher_is_better,
                    "truncated": found.score.truncated,
                    "predictions": [asdict(each) for each in found.score.predictions],
                },
            )
            console.print(f"written: {file}", highlight=False, soft_wrap=True)
