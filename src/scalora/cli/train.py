"""``scalora train``: run a recipe, show it live, end with a table."""

from __future__ import annotations

import shlex
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ..common.errors import ScaloraError
from ..common.launch import launched, speaks
from ..common.quiet import quiet
from .console import plain_console
from .guard import guarded, leave


def train_verb(
    recipe_path: Annotated[
        str, typer.Argument(metavar="RECIPE.yaml", help="What is trained, on what, how, and where to.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace a value, e.g. training.learning_rate=1e-3; repeatable."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the output folder's last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run; a finished one is kept as <output>.previous.")
    ] = False,
) -> None:
    """Fine-tune by a recipe and score before and after.

    Leaves metrics.json, the resolved recipe, the adapter in PEFT's format, curves.png and rank.png in the output.
    Ctrl-C finishes the step, saves a checkpoint and exits with 130.
    """
    with guarded():
        from ..common.processes import one_run

        if resume and overwrite:
            raise ScaloraError("--resume continues the run that --overwrite would replace: give one of the two")
        with one_run():
            _run(recipe_path, set_ or [], resume, overwrite)


def _run(recipe_path: str, overrides: list[str], resume: bool, overwrite: bool) -> None:
    from ..common.processes import ending_together
    from ..runs.recipe import load_recipe

    with ending_together():
        recipe = load_recipe(recipe_path, overrides)
    quiet()
    from ..runs import training

    console = plain_console(quiet=not speaks())
    said = f" on {recipe.model}, rank {recipe.method.rank} → {recipe.output}"
    console.print(Text.assemble((recipe.method.name, "bold"), said))
    watcher = live_watcher(console)
    try:
        with watcher.display:
            result = training.train(recipe, resume=resume, overwrite=overwrite, watcher=watcher)
            watcher.finish()
    except training.Interrupted as stopped:
        words = ["scalora", "train", recipe_path, *(part for each in overrides for part in ("--set", each)), "--resume"]
        again = shlex.join(words) if launched() == 1 else "the same command and --resume"
        where = (
            f"last checkpoint: {stopped.checkpoint}; continue with: {again}"
            if stopped.checkpoint
            else "no checkpoint was written yet"
        )
        if stopped.trained:  # all steps were made
            where = (
                f"trained, but not scored: {stopped.trained} (scalora evaluate {shlex.quote(recipe.output)} does that)"
            )
        leave(f"stopped; {where}", 130)
    else:
        show_result(console, result)


class _Pace:
    """How long the rest of a phase takes at the pace so far, and when it is time to say so: after 2 s, then 15 s."""

    def __init__(self, done: int = 0) -> None:
        self.began, self.first = time.monotonic(), done
        self.due = self.began + 2.0

    def left(self, done: int, total: int) -> str:
        """The rest in words, said now; `done` and `total` count sequences or steps."""
        self.due = time.monotonic() + 15.0
        seconds = (time.monotonic() - self.began) / max(1, done - self.first) * (total - done)
        return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"


def live_watcher(console: Console) -> Any:
    """A watcher that draws progress bars on a terminal, and prints plain lines elsewhere."""
    from transformers import TrainerCallback

    from ..runs.training import Watcher

    class Live(Watcher, TrainerCallback):
        def __init__(self) -> None:
            bar = BarColumn(max(6, min(40, console.width - 72)))  # counts and times are to be read whole on 80 columns
            self.display = Progress(
                TextColumn("{task.description:23}"), bar, MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console, disable=not console.is_terminal,
            )  # fmt: skip
            self.bar: Any = None
            self.name, self.pace = "", _Pace()
            self.callbacks = (self,)

        def phase(self, text: str) -> None:
            if not console.is_terminal:
                self.say(text)
            self.name, self.pace = text, _Pace()
            self.finish()
            self.bar = self.display.add_task(text, total=None, note="")

        def say(self, text: str) -> None:
            console.print(text, highlight=False)

        def finish(self) -> None:
            """A phase without a count is over as a whole."""
            if self.bar is not None and self.display.tasks[self.bar].total is None:
                self.display.update(self.bar, completed=1, total=1)

        def progress(self, done: int, total: int) -> None:
            self.display.update(self.bar, completed=done, total=total)
            if not console.is_terminal and done < total and time.monotonic() > self.pace.due:
                self.say(f"  {self.name}: {done}/{total}, {self.pace.left(done, total)}")

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            self.pace = _Pace(state.global_step)

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if not control.should_log:  # else on_log says how far it is
                self.progress(state.global_step, state.max_steps)

        def on_log(self, args, state, control, **kwargs) -> None:
            logs = kwargs.get("logs") or {}
            if "loss" in logs:
                note = f"loss {logs['loss']:.4f}  lr {logs.get('learning_rate', 0):.2e}"
                self.display.update(self.bar, completed=state.global_step, total=state.max_steps, note=note)
                if not console.is_terminal:
                    left = self.pace.left(state.global_step, state.max_steps)
                    self.say(f"  step {state.global_step}/{state.max_steps}  {note}  {left}")

    return Live()


def show_result(console: Console, result: Any) -> None:
    """The closing table, some held-out rows before and after, and how to load the result."""
    metrics = result.metrics
    scores = Table(title="held-out data", title_justify="left")
    for column in ("metric", "before", "after", "change"):
        scores.add_column(column, justify="left" if column == "metric" else "right")
    for name, after in metrics["after"].items():
        before = metrics["before"][name]
        scores.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    console.print(scores)
    if said := worse_sentence(metrics):
        console.print(said, highlight=False)

    facts = Table(show_header=False)
    share = metrics["trainable_parameters"] / max(1, metrics["parameters"])
    facts.add_row("steps", str(metrics["steps"]))
    facts.add_row("training time", _times(metrics))
    facts.add_row("trainable parameters", f"{metrics['trainable_parameters']:,} ({share:.2%})")
    kinds = metrics["rank"]["kinds"].items()
    facts.add_row("rank of the accumulated update", ", ".join(f"{kind} {rank:.0f}" for kind, rank in kinds))
    if lost := sum(metrics["truncated"].values()):
        facts.add_row("truncated to max_length", f"{lost} sequences")
    console.print(facts)

    examples = Table(title="held-out examples", title_justify="left")
    for column in ("text", "right", "before", "after"):
        examples.add_column(column, overflow="fold")
    for old, new in list(zip(result.before.predictions, result.after.predictions, strict=True))[:5]:
        examples.add_row(_clip(new.text), new.expected, _verdict(old), _verdict(new))
    console.print(examples)
    console.print(f"adapter: {result.folder / 'adapter'}   pictures: curves.png, rank.png beside it", highlight=False)
    console.print(Panel(Syntax("\n".join(result.loading), "python"), title="load it with plain PEFT", expand=False))


def _times(metrics: dict[str, Any]) -> str:
    """The whole time, what of it the steps took, and what the rest is."""
    whole, steps = metrics["train_seconds"], metrics["steps_seconds"]
    rest = "the rest: data, ranks, evaluation, checkpoints"
    return f"{whole:.1f} s, of which steps {steps:.1f} s (median {metrics['seconds_per_step']:.3g} s each); {rest}"


def worse_sentence(metrics: dict[str, Any]) -> str | None:
    """What is to be said where held-out data are predicted worse after training than before; else None."""
    before, after = metrics["before"] or {}, metrics["after"]
    name = "nll" if "nll" in after else metrics["primary"]
    if name not in before:
        return None
    gain = after[name] - before[name]
    if (gain if name != "nll" and metrics["higher_is_better"] else -gain) >= 0:
        return None
    return (
        f"worse than before training: {name} {before[name]:.4f} → {after[name]:.4f} on held-out data; try a lower "
        "training.learning_rate or fewer steps"
    )


def _verdict(prediction: Any) -> str:
    if prediction.predicted is None:
        return f"{prediction.probability:.3f}" if prediction.probability is not None else ""
    mark = "✓" if prediction.predicted == prediction.expected else "✗"
    chance = f" ({prediction.probability:.0%})" if prediction.probability is not None else ""
    return f"{mark} {prediction.predicted}{chance}"


def _clip(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
