"""What lies in a folder: a run, a checkpoint, an adapter, a model or an export; from its JSON and safetensors alone."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...common.disk_layout import (
    ADAPTER,
    BASE_FILE,
    CHECKPOINTS,
    DELTA,
    EXPORT,
    METRICS,
    PREFIX,
    RECIPE,
    STATE_FILE,
    WEIGHTS,
)
from ...common.errors import ScaloraError
from ...common.files import damage, expand_user, is_sealed
from ...layers.lora_config import UNREADABLE, VARIANTS, refuse_former_pair, scale
from ..folder import last_checkpoint
from ..stored import of_today
from ..yaml_words import load_written

ArtefactKind = Literal["lora", "peft", "wrapped", "model", "delta"]
_SETTINGS: dict[str, ArtefactKind] = {
    "adapter_config.json": "peft",  # any of PEFT's methods; "lora" where it is plain LoRA
    "adapter.json": "wrapped",  # mora, alpha-lora
    "config.json": "model",
}


class LayerFactors(NamedTuple):
    """P (m, k), with the scale, and Q (n, k) of one layer's update P Qᵀ."""

    P: Tensor
    Q: Tensor


@dataclass(frozen=True)
class Artefact:
    """Weights in a folder, what kind they are, and what is known of their origin."""

    path: Path  # as it was asked for
    folder: Path  # where the weights lie
    kind: ArtefactKind
    config: dict[str, Any]  # adapter_config.json, adapter.json, config.json or export.json
    run: Path | None = None  # the run that it belongs to
    recipe: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    export: dict[str, Any] | None = None
    state: dict[str, Any] | None = None  # of a ScaLoRA checkpoint: step, config, layers
    trainer: dict[str, Any] = field(default_factory=dict)  # trainer_state.json
    only_ours: bool = False  # a checkpoint that PEFT alone cannot make a model of

    @property
    def moved(self) -> bool:
        """Whether accumulate='base' has written to base weights that lie here too."""
        return (self.folder / BASE_FILE).is_file()

    @property
    def in_parts(self) -> bool:
        """Whether trained and accumulated columns can still be told apart."""
        return self.state is not None and self.state["config"]["accumulate"] == "adapter"

    @property
    def step(self) -> int | None:
        """Optimizer steps taken, where that is known."""
        if self.trainer:
            return self.trainer.get("global_step")
        return (self.export or self.metrics or {}).get("steps")

    @property
    def scores(self) -> dict[str, Any] | None:
        """What a finished run has measured, or what its export remembers."""
        if self.export is not None:
            return self.export["scores"]
        ours = self.metrics is not None and self.folder.name == ADAPTER
        return {key: self.metrics[key] for key in ("split", "before", "after")} if ours and self.metrics else None

    @property
    def made_by(self) -> dict[str, Any] | None:
        """The recipe of the run that it belongs to, or was exported from."""
        exported = (self.export or {}).get("recipe")
        return self.recipe if self.recipe is not None or exported is None else of_today(exported)

    @property
    def fingerprint(self) -> str | None:
        """That of the base model, where it is known."""
        return (self.metrics or self.export or {}).get("base_fingerprint")

    @property
    def base(self) -> str | None:
        """The base model by name or path; a recipe's relative path as the run found it, where that is known."""
        found = self.config.get("base_model_name_or_path") or self.config.get("base") or (self.export or {}).get("base")
        if self.recipe is None:
            return found
        named = self.recipe["model"]
        if found is None or expand_user(named).exists() or not Path(found).is_absolute():
            return named
        return found if Path(found).name == Path(named).name else named

    @property
    def method(self) -> str:
        """The method's name, or PEFT's of its type."""
        if self.recipe is not None:
            method = self.recipe["method"]
            return method if isinstance(method, str) else method["name"]
        if (self.export or {}).get("method"):
            return str((self.export or {})["method"])
        return "scalora" if self.state else str(self.config.get("method") or self.config.get("peft_type") or "a model")


def find_artefact(path: str | Path, *, thorough: bool = False) -> Artefact:
    """What lies at ``path``; of a run its result, or its newest checkpoint where it has none yet.

    Of a sealed checkpoint the sizes of all files are compared, ``thorough`` their contents too.

    Raises:
        ScaloraError: nothing of ours or PEFT's lies there, or it is incomplete or damaged.
    """
    if not isinstance(path, str | os.PathLike):
        raise ScaloraError(f"path is {path!r}: give the folder of a run, a checkpoint or an adapter")
    path = expand_user(path)
    if not os.path.lexists(path):
        raise ScaloraError(f"there is no {str(path)!r}: give the folder of a run, a checkpoint or an adapter")
    if not path.is_dir():
        raise ScaloraError(f"{str(path)!r} is a file: give the folder that it lies in")
    folder, run = path, None
    if (path / RECIPE).is_file():
        run, adapter = path, path / ADAPTER
        newest = adapter if adapter.is_dir() else last_checkpoint(path)
        if newest is None:
            raise ScaloraError(f"the run in {str(path)!r} holds neither an adapter nor a checkpoint yet: let it train")
        folder = newest
    else:
        above = path.resolve().parents
        owner = above[0] if path.resolve().name == ADAPTER else above[1] if len(above) > 1 else above[0]
        inside = path.resolve().name == ADAPTER or path.resolve().parent.name == CHECKPOINTS
        run = owner if inside and (owner / RECIPE).is_file() else None
    export = read_json_object(folder / EXPORT) if (folder / EXPORT).is_file() else None
    kind, config = _kind(folder, path, export)
    only_ours = config.get("peft_type") == UNREADABLE
    if only_ours:
        kind, config = "lora", config | {"peft_type": "LORA"}
    trainer = folder / "trainer_state.json"
    artefact = Artefact(
        path, folder, kind, config, run,
        recipe=_read_recipe(run / RECIPE) if run else None,
        metrics=read_json_object(run / METRICS) if run and (run / METRICS).is_file() else None,
        export=export,
        state=_state(folder / STATE_FILE) if (folder / STATE_FILE).is_file() else None,
        trainer=read_json_object(trainer) if trainer.is_file() else {},
        only_ours=only_ours,
    )  # fmt: skip
    if is_sealed(folder) and (reason := damage(folder, content=thorough)):
        raise ScaloraError(f"checkpoint {folder} is damaged ({reason}): take another one")
    _check_complete(artefact)
    return artefact


def read_factors(artefact: Artefact) -> dict[str, tuple[LayerFactors, LayerFactors | None]]:
    """Trained and accumulated factors of every layer of a LoRA, by the name of the layer in the base model.

    In a checkpoint of ScaLoRA the first r columns are those that are trained.

    Raises:
        ScaloraError: a file is missing or damaged.
    """
    ranks = {name.split(PREFIX, 1)[-1]: r for name, r in (artefact.state or {}).get("layers", {}).items()}
    found = _factors(artefact, ranks)
    if not artefact.in_parts or artefact.state is None:
        return {name: (factors, None) for name, factors in found.items()}
    used = {name.split(PREFIX, 1)[-1]: k for name, k in artefact.state["store"]["used"].items()}
    for name, (P, _) in found.items():
        if name in ranks and P.shape[1] != ranks[name] + used[name]:
            raise ScaloraError(
                f"{artefact.folder}: layer {name} has {P.shape[1]} columns, but {STATE_FILE} says {ranks[name]} "
                f"trained and {used[name]} accumulated ones: they do not belong together; take another checkpoint"
            )
    return {name: _parts(P, Q, ranks.get(name, P.shape[1])) for name, (P, Q) in found.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises ScaloraError where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object; raises ScaloraError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise ScaloraError(f"{path} holds no JSON object: the folder is not what it seems; give another")
    return content


def _kind(folder: Path, path: Path, export: dict[str, Any] | None) -> tuple[ArtefactKind, dict[str, Any]]:
    if (folder / DELTA).is_file():
        return "delta", export or {}
    found = next((name for name in _SETTINGS if (folder / name).is_file()), None)
    if found is None:
        nested = max(path.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime, default=None)
        hint = f"did you mean {str(nested)!r}?" if nested else "give the folder of a run, a checkpoint or an adapter"
        raise ScaloraError(f"{str(folder)!r} holds no {', '.join(_SETTINGS)}: {hint}")
    config = read_json_object(folder / found)
    plain = config.get("peft_type") == "LORA" and not any(config.get(name) for name in VARIANTS)
    if plain and all(
        re.search(r"\.lora_([AB]\.weight|embedding_[AB])$", n) for n in _names(folder / WEIGHTS) if ".lora_" in n
    ):
        return "lora", config
    return _SETTINGS[found], config


def _check_complete(artefact: Artefact) -> None:
    """A part that is missing would change the function without a word."""
    refuse_former_pair(artefact.folder)
    if artefact.state is None:
        return
    if artefact.state["config"]["accumulate"] == "base" and not artefact.moved:
        raise ScaloraError(
            f"checkpoint {artefact.folder} lacks {BASE_FILE}, where a part of the update lies: take a whole checkpoint"
        )


def _factors(artefact: Artefact, ranks: dict[str, int]) -> dict[str, LayerFactors]:
    folder, config = artefact.folder, artefact.config
    tensors, found = read_tensors(folder / WEIGHTS), {}
    for key, A in tensors.items():
        of_B = re.search(r"\.lora_(embedding_)?B(\.weight)?$", key)
        if of_B:  # PEFT's B is the paper's A
            name = key[: of_B.start()].removeprefix(PREFIX)
            Bt = tensors.get(key[: of_B.start()] + of_B[0].replace("B", "A"))
            if Bt is None or Bt.shape[0] != A.shape[1]:
                raise ScaloraError(f"{folder / WEIGHTS}: layer {name} lacks its lora_A: take another checkpoint")
            columns = A.shape[1]
            if artefact.only_ours:  # its configuration has the ranks that are trained
                columns = ranks.get(name, columns)
            if artefact.moved:  # its last column is a mark
                A, Bt = A[:, :columns], Bt[:columns]
            A, Bt = A.flatten(1), Bt.flatten(1)
            found[name] = LayerFactors(A * scale(config, name, columns), Bt.mT)
    return found


def _parts(P: Tensor, Q: Tensor, trained: int) -> tuple[LayerFactors, LayerFactors]:
    more = P[:, trained:].any(0) & Q[:, trained:].any(0)
    held = LayerFactors(P[:, trained:][:, more], Q[:, trained:][:, more])
    return LayerFactors(P[:, :trained], Q[:, :trained]), held


def _state(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["state"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise _unreadable(path, error) from error


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        content = load_written(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict) or not {"model", "method", "task"} <= set(content):
        raise ScaloraError(f"{path} is no recipe: put back the one that `scalora train` wrote")
    return of_today(content)


def _unreadable(path: Path, error: Exception) -> ScaloraError:
    if isinstance(error, FileNotFoundError):
        return ScaloraError(f"{path} is missing: give a complete folder")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ScaloraError(f"{path} cannot be read ({reason}): it is damaged or not yours to read; take another copy")
