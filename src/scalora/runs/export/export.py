"""From what a run leaves to what others load: one plain LoRA, a whole model, or the dense difference."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...common.disk_layout import DELTA, EXPORT, PREFIX, REPLACED
from ...common.environment import environment
from ...common.errors import ScaloraError
from ...common.files import expand_user, replace_folder, write_json
from ...engine.plain_lora import Kept, Truncation, joined_factors, plain_lora, write_plain_lora
from ...layers.peft_lora import sort_layers
from ...methods.lora import said_beside
from ...models.heads import auto_class
from .artefact import Artefact, find_artefact, read_factors
from .base_model import Base
from .restored import Restored, load_delta
from .restored_peft import restore
from .verify import HeldOutLoss, probe

Form = Literal["lora", "merged", "delta"]
# Largest difference of logits, computed in float32 and relative to the largest, at which an exact export counts as the
# same function: sums in another order. Where weights are bf16 or fp16 each is rounded once, whose effect depends on the
# model: there only what rounding cannot explain is refused.
EXACT, ROUNDED = 1e-4, 0.25
# Which forms go onto a base that plain transformers loads; one that is rounded to NF4 it does not.
_GO_ON: dict[str, tuple[str, ...]] = {"none": get_args(Form), "nf4-rounded": ("merged",)}


@dataclass(frozen=True)
class Exported:
    """An export that has been loaded back and compared with its origin."""

    folder: Path
    kept: dict[str, Kept]  # by layer; for --to lora only
    difference: float  # largest of the logits on the probe inputs
    largest: float  # largest logit there
    loss: tuple[float, float] | None  # before, after
    loss_about: str  # the examples it was measured on, or why there is none


def export(
    path: str | Path,
    *,
    to: str,
    rank: int | None = None,
    energy: float | None = None,
    output: str | Path | None = None,
    base: str | None = None,
    overwrite: bool = False,
    examples: int = 64,
    log: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export a run, a checkpoint or an adapter, load the result back, and compare.

    Args:
        path: the folder of a run, a checkpoint or an adapter.
        to: "lora" (one plain PEFT LoRA), "merged" (the whole model) or "delta" (the dense difference).
        rank: of the plain LoRA, by truncated SVD of its factors; None is exact.
        energy: share of each layer's squared norm that a truncation keeps, in place of ``rank``.
        output: the folder to write, ``<run>-<to>`` by default; it appears complete or not at all.
        base: where the base model lies, if not where the run found it.
        overwrite: replace an earlier export.
        examples: held-out examples to measure the loss on, where there is a recipe; 0 for none.
        log: called as each phase begins.

    Raises:
        ScaloraError: bad input, a form that cannot be exact, or a result that differs from its origin.
    """
    if to not in get_args(Form):
        raise ScaloraError(f"to is {to!r}: choose one of {', '.join(get_args(Form))}")
    if to != "lora" and (rank is not None or energy is not None):
        raise ScaloraError(f"rank and energy are for lora only: a {to} export is not truncated")
    if examples < 0:
        raise ScaloraError(f"examples is {examples}: give 0 or more")
    write, load = _FORMS[to]
    truncation = None if rank is None and energy is None else Truncation(rank=rank, energy=energy)
    artefact = find_artefact(path, thorough=True)
    _check_form(artefact, to)
    if rank is not None:
        _check_rank(artefact, rank)
    ending = f"{to}-rank{rank}" if rank else f"{to}-energy{energy:g}" if energy else to
    folder = expand_user(output).absolute() if output else _beside(artefact, ending)
    with fresh_folder(folder, artefact, overwrite) as temporary:
        source = Base(artefact, base, need_tokenizer=artefact.recipe is not None)
        log(f"loading {artefact.folder}")
        trained = restore(artefact, source)
        if to != "merged" and source.overrides:
            raise ScaloraError(
                f"{artefact.folder} was trained on a base with other values than its own (config: {source.overrides}): "
                f"a {to} export would be put on the base without them, which computes something else; use --to merged"
            )
        if to not in _GO_ON.get(source.quantization, ("merged", "lora")):
            raise ScaloraError(
                f"{artefact.folder} was trained on a base in {source.quantization}: a {to} export would be put on the "
                "float weights, which compute something else; use --to merged, or the run's adapter as it is"
            )
        before = probe(trained.model)
        if not before.isfinite().all():
            raise ScaloraError(
                f"{artefact.folder}: its logits are not finite, so there is nothing to export: the run has diverged; "
                "take an earlier checkpoint"
            )
        losses = HeldOutLoss(artefact, source, examples)
        loss_before = losses.measure(trained.model)
        log(f"writing {to}")
        with _writing(folder):
            kept = write(trained, temporary, source, truncation)
        dtype = next(p.dtype for p in trained.model.parameters() if p.is_floating_point())
        del trained
        log("loading it back")
        model = load(temporary, source)
        after = probe(model)
        difference, largest = float((after - before).abs().max()), float(before.abs().max())
        limit = largest * (EXACT if to == "lora" or dtype == torch.float32 else ROUNDED)
        if truncation is None and not difference <= limit:
            raise ScaloraError(
                f"the {to} export computes something else than {artefact.folder}: its logits differ by "
                f"{difference:.3g}, with {limit:.3g} allowed; nothing was written, please report this"
            )
        loss_after = losses.measure(model)
        loss = None if loss_before is None or loss_after is None else (loss_before, loss_after)
        done = Exported(folder, kept, difference, largest, loss, losses.about)
        with _writing(folder):
            write_json(temporary / EXPORT, _record(artefact, source, to, rank, energy, done))
            for file in temporary.iterdir():  # safetensors writes for its owner only; who serves it may be another
                if file.is_file():  # a folder, as that of more chat templates, is entered by another right
                    shutil.copymode(temporary / EXPORT, file)
    return done


@contextmanager
def fresh_folder(folder: Path, artefact: Artefact, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``folder`` to write into; it takes its name at the end, or vanishes with whatever went wrong.

    Raises:
        ScaloraError: there is something of that name that may not be replaced, or it cannot be written.
    """
    with _writing(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        missing = [parent for parent in folder.parents if not parent.exists()]
    if taken and not overwrite:
        raise ScaloraError(f"output is {str(folder)!r}, which is not empty: choose another, or --overwrite it")
    if taken and (not (folder / EXPORT).is_file() or artefact.folder.resolve().is_relative_to(folder.resolve())):
        raise ScaloraError(f"output is {str(folder)!r}, which is no earlier export of this: it will not be replaced")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with _writing(folder):
            temporary.mkdir(parents=True)
        yield temporary
        with _writing(folder):
            replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _beside(artefact: Artefact, ending: str) -> Path:
    """A name beside the run, with the checkpoint's name where it is one; beside the folder where there is no run."""
    place = (artefact.run or artefact.path).resolve()
    checkpoint = f"-{artefact.folder.name}" if artefact.run and artefact.trainer else ""
    return place.with_name(f"{place.name}{checkpoint}-{ending}")


def _check_form(artefact: Artefact, to: str) -> None:
    if artefact.kind == "delta":
        raise ScaloraError(
            f"{artefact.folder} is a delta export, which cannot be exported again: give what it came from"
        )
    if artefact.kind == "model" and artefact.run is None and to == "merged":
        raise ScaloraError(f"{artefact.folder} is a whole model already: use it as it is")
    if to == "lora" and (artefact.kind != "lora" or artefact.moved):
        why = {
            "lora": "accumulate='base' has added its moved differences to the base weights, which is no low rank",
            "peft": f"it is {artefact.config.get('peft_type')} and not plain LoRA",
            "wrapped": f"{artefact.method} has layers of its own",
            "model": "its weights themselves were trained",
        }
        raise ScaloraError(
            f"{artefact.folder} is no plain LoRA: {why[artefact.kind]}; use --to merged or --to delta, which are exact"
        )


def _check_rank(artefact: Artefact, rank: int) -> None:
    available = 0
    for trained, accumulated in read_factors(artefact).values():
        columns = trained.P.shape[1] + (accumulated.P.shape[1] if accumulated else 0)
        available = max(available, min(columns, trained.P.shape[0], trained.Q.shape[0]))
    if rank > available:
        raise ScaloraError(
            f"rank is {rank}, but no layer's update has more than {available}: leave it out, which is exact, or choose "
            f"{available} or less"
        )


def _write_lora(trained: Restored, folder: Path, base: Base, truncation: Truncation | None) -> dict[str, Kept]:
    write_plain_lora(folder, *plain_lora(trained.model, truncation or joined_factors))
    said_beside(base.head, folder, trained.model)
    if truncation is not None:
        return {name.removeprefix(PREFIX): kept for name, kept in truncation.kept.items()}
    ranks = {layer.name: joined_factors(layer)[0].shape[1] for layer in sort_layers(trained.model)[0]}
    return {name.removeprefix(PREFIX): Kept(rank, rank, 1.0) for name, rank in ranks.items()}


def _write_merged(trained: Restored, folder: Path, base: Base, truncation: None) -> dict[str, Kept]:
    base.publish(trained.merge(), folder)
    return {}


def _write_delta(trained: Restored, folder: Path, base: Base, truncation: None) -> dict[str, Kept]:
    about = {"format": "pt", "layout": "W + delta, in float32; replaced.safetensors takes the place of W"}
    save_file({name: delta.cpu().contiguous() for name, delta in trained.deltas()}, folder / DELTA, about)
    if replaced := trained.replaced():
        save_file({name: tensor.cpu().contiguous() for name, tensor in replaced.items()}, folder / REPLACED)
    return {}


def _load_lora(folder: Path, base: Base) -> Any:
    return PeftModel.from_pretrained(base.load(), str(folder)).eval()


def _load_merged(folder: Path, base: Base) -> Any:
    return auto_class(base.head).from_pretrained(str(folder), dtype="auto", attn_implementation=base.attention).eval()


_FORMS: dict[str, tuple[Callable[..., dict[str, Kept]], Callable[[Path, Base], Any]]] = {
    "lora": (_write_lora, _load_lora),
    "merged": (_write_merged, _load_merged),
    "delta": (_write_delta, load_delta),
}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ScaloraError(
            f"output is {str(folder)!r}, which cannot be written: {reason}; choose another, or make room"
        ) from error


def _record(
    artefact: Artefact, base: Base, to: str, rank: int | None, energy: float | None, done: Exported
) -> dict[str, Any]:
    return {
        "to": to,
        "rank": rank,
        "energy": energy,
        "from": str(artefact.folder.resolve()),
        "method": artefact.method,
        "steps": artefact.step,
        "base": os.path.abspath(expand_user(base.source)) if expand_user(base.source).is_dir() else base.source,
        "base_fingerprint": base.fingerprint,
        "class_names": base.class_names,
        "recipe": artefact.recipe,
        "scores": artefact.scores,
        "layers": {name: kept._asdict() for name, kept in done.kept.items()},
        "logits": {"largest_difference": done.difference, "largest": done.largest},
        "loss": done.loss and {"original": done.loss[0], "export": done.loss[1]},
        "loss_about": done.loss_about,
        "environment": environment(),
    }
