"""``scalora inspect``: what lies in a folder, without loading a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .console import plain_console
from .guard import guarded

if TYPE_CHECKING:
    from ..runs.export.artefact import Artefact


def inspect(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Runs, checkpoints, adapters or exports; one or more.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For machines, with every layer; a list of several.")] = False,
) -> None:
    """Show ranks, norms, sizes and origin of what lies in a folder, or in each of several, without loading a model."""
    with guarded():
        from ..runs.export.artefact import find_artefact

        reports = [describe(find_artefact(path)) for path in paths]
        if as_json:
            print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2, ensure_ascii=False))
        else:
            for report in reports:
                show_report(plain_console(), report)


def describe(artefact: Artefact) -> dict[str, Any]:
    """Everything there is to say, for JSON."""
    from ..common.disk_layout import CHECKPOINTS
    from ..runs.export.artefact import read_factors
    from ..runs.export.layer_figures import by_kind, layer_figures

    export, log = artefact.export, artefact.trainer.get("log_history") or [{}]
    figured, layers = _with_parts(artefact), []
    if figured.kind == "lora":
        layers = [layer_figures(name, *parts) for name, parts in read_factors(figured).items()]
    checkpoints = [path.parent for path in artefact.path.glob(f"{CHECKPOINTS}/checkpoint-*/trainer_state.json")]
    return {
        "path": str(artefact.path),
        "what": _what(artefact),
        "weights": str(artefact.folder),
        "base": artefact.base,
        "base_fingerprint": artefact.fingerprint,
        "method": artefact.method,
        "config": (figured.state or {}).get("config"),
        "steps": artefact.step,
        "last_log": log[-1],
        "scores": artefact.scores,
        "bytes": _size(artefact.folder),
        "checkpoints": {folder.name: _size(folder) for folder in sorted(checkpoints, key=_number)},
        "versions": ((artefact.metrics or export or {}).get("environment") or {}).get("versions"),
        "recipe": artefact.recipe or (export or {}).get("recipe"),
        "export": {key: export.get(key) for key in ("to", "rank", "energy", "from", "logits", "loss")}
        if export
        else None,
        "moved_weights": figured.moved,
        "figures_of": str(figured.folder),
        "kinds": by_kind(layers),
        "layers": [asdict(layer) for layer in layers],
    }


def show_report(console: Console, report: dict[str, Any]) -> None:
    """The same as tables: facts, then figures of each kind of layer."""
    facts = Table(title=report["what"], title_justify="left", show_header=False)
    for name, value in _facts(report):
        if value not in (None, ""):
            facts.add_row(name, str(value))
    console.print(facts)
    if not report["kinds"]:
        return
    ranks = Table("layer", "number", "m×n", "columns", "rank", "effective rank", title_justify="left")
    ranks.title = f"update of each kind of layer in {report['figures_of']}, medians (all layers: --json)"
    in_parts = any(layer["accumulated"] for layer in report["layers"])
    parts = ["norm", "trained", "accumulated"] if in_parts else ["norm"]
    norms = Table("layer", *parts, *["accumulated share"] * in_parts)
    for kind, of in report["kinds"].items():
        shape = "×".join(map(str, of["shape"])) if of["shape"] else "various"
        rank = f"{of['rank']:g}", f"{of['effective_rank']:.1f}"
        ranks.add_row(kind, str(of["layers"]), shape, f"{of['columns']:g}", *rank)
        norms.add_row(kind, *(f"{of[part]:.3g}" for part in parts), *[f"{of['accumulated_share']:.1%}"] * in_parts)
    console.print(ranks)
    console.print(norms)
    if report["moved_weights"]:
        console.print("not in these figures: what accumulate='base' has added to the base weights", highlight=False)


def _facts(report: dict[str, Any]) -> list[tuple[str, Any]]:
    export, scores, log = report["export"] or {}, report["scores"] or {}, report["last_log"]
    options = ", ".join(f"{key}={value}" for key, value in (report["config"] or {}).items())
    task = (report["recipe"] or {}).get("task")
    before, after = scores.get("before") or {}, scores.get("after") or {}
    scored = [(f"{before[name]:.4f} → " if name in before else "") + f"{value:.4f}" for name, value in after.items()]
    size = {name: f"{name} ({human(size)})" for name, size in report["checkpoints"].items()}
    return [
        ("weights", f"{report['weights']} ({human(report['bytes'])})"),
        ("base model", report["base"]),
        ("its fingerprint", report["base_fingerprint"]),
        ("method", f"{report['method']} ({options})" if options else report["method"]),
        ("steps", report["steps"]),
        ("loss", f"{log['loss']:.4f} at step {log['step']}" if "loss" in log else None),
        ("task", f"{task['kind']}, {task['data']['train']}" if task else None),
        ("scores", ", ".join(f"{name} {value}" for name, value in zip(after, scored, strict=True))),
        ("exported from", export.get("from")),
        ("checkpoints", ", ".join(size.values())),
        ("versions", ", ".join(f"{name} {version}" for name, version in (report["versions"] or {}).items())),
    ]


def _with_parts(artefact: Artefact) -> Artefact:
    """The newest checkpoint in place of a run's joined adapter, where it is the same update still in its two parts."""
    from ..runs.export.artefact import find_artefact
    from ..runs.folder import last_checkpoint

    if (
        artefact.path != artefact.run
        or artefact.in_parts
        or (artefact.recipe or {}).get("training", {}).get("load_best_model_at_end")
    ):
        return artefact
    newest = last_checkpoint(artefact.path)
    parts = find_artefact(newest) if newest else artefact
    return parts if parts.in_parts and parts.step == artefact.step else artefact


def human(size: int) -> str:
    """Bytes in the unit that suits them."""
    amount, units = float(size), ["B", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.4g} {units[0]}"


def _what(artefact: Artefact) -> str:
    kind = {
        "lora": "plain LoRA",
        "peft": f"PEFT adapter ({artefact.config.get('peft_type')})",
        "wrapped": "adapter with layers of its own",
        "model": "whole model",
        "delta": "dense difference",
    }[artefact.kind]
    if artefact.in_parts:
        kind = "trained and accumulated LoRA"
    if artefact.moved:
        kind = "LoRA and moved base weights"
    if artefact.path == artefact.run:
        return f"run, {'finished' if artefact.metrics else 'not finished'}: {kind}"
    if artefact.export:
        return f"export: {kind}"
    return f"{'checkpoint' if artefact.trainer else 'folder'}: {kind}"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _number(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])
