"""The folder of one run: claimed before anything expensive starts, held by one process, and never half-written."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from ..common import processes
from ..common.disk_layout import ADAPTER, CHECKPOINTS, INPUTS, METRICS, RECIPE
from ..common.errors import ScaloraError
from ..common.files import damage, expand_user, is_sealed, write_json, write_text
from .making_room import Room, is_free, is_run, lock

if TYPE_CHECKING:
    from filelock import FileLock

    from .inputs import Inputs
    from .precision import Precision
    from .recipe import Recipe  # itself slow to import

_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container")  # what torch.save's errors name


class RunFolder:
    """A writable folder that holds nothing, or just what is to be resumed; ours until :meth:`release`.

    With ``overwrite`` an earlier run makes room as :class:`~scalora.runs.making_room.Room` says.

    Raises:
        ScaloraError: it holds another run or other things, another process works in it, there is nothing to resume,
            what is to be resumed is damaged, or it cannot be written.
    """

    def __init__(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        self.path = expand_user(recipe.output)
        self.checkpoint: Path | None = None  # to resume from
        self._room = Room(self.path)
        self._held: FileLock | None = None
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        try:
            if resume:
                _check_resumable(self.path, recipe)
            elif not is_free(self.path):
                if not overwrite:
                    raise _taken(self.path)
                self._room.make()
            self.path.mkdir(parents=True, exist_ok=True)
            self._held = lock(self.path)
            if resume:
                self.checkpoint = _sound_checkpoint(self.path)
            write_text(self.path / RECIPE, text)
        except BaseException as error:
            if not resume:
                self._vanish()
            if isinstance(error, OSError):
                raise ScaloraError(
                    f"output is {str(self.path)!r}, which cannot be written: {error.strerror or error}"
                ) from error
            raise

    def settle(self, inputs: Inputs) -> str:
        """Note what the run reads, or see that it reads what it began with; what is to be said, if anything.

        Raises:
            ScaloraError: data, tokenizer or base model are others than before.
        """
        file, said = self.path / INPUTS, self._room.said
        if self.checkpoint is not None and file.exists():
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                stored = None
            whose = f"the run in {str(self.path)!r}"
            inputs.refuse_other(stored, whose, "put back what it began with to resume, or start anew (--overwrite)")
        elif self.checkpoint is not None:
            said = f"{file} is not there: whether data, tokenizer and base model are still the same cannot be told"
        with writing(self.path):
            write_json(file, inputs.encode())
        return said

    def release(self) -> None:
        """Let others in. Where the run came to nothing, without checkpoint or adapter, no shell stays behind."""
        _remove_unfinished(self.path)
        if last_checkpoint(self.path) is None and not (self.path / ADAPTER).exists():
            self._vanish()
        else:
            self._room.keep()
        if self._held is not None:
            self._held.release()

    def _vanish(self) -> None:
        if self._held is not None:  # otherwise it may be another's
            shutil.rmtree(self.path, ignore_errors=True)
        self._room.give_back()


def _taken(folder: Path) -> ScaloraError:
    if not is_run(folder):
        return ScaloraError(
            f"output is {str(folder)!r}, which is not empty and not a run of scalora: choose another (--set output=...)"
        )
    return ScaloraError(
        f"output is {str(folder)!r}, which is not empty: choose another (--set output=...), continue it (--resume), or "
        "replace it (--overwrite keeps a finished one as .previous)"
    )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a disk that is full, or takes no writing, into one message; and a network that fails into another.

    Raises:
        ScaloraError: something could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in _TORCH_CANNOT_WRITE):
            raise
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)) or _of_the_hub(error):
            raise ScaloraError(
                f"the network failed ({' '.join(str(error).split())[:200]}): check it, or set training.report_to: none"
            ) from error
        _remove_unfinished(folder)  # the one that did not fit
        done = last_checkpoint(folder)
        way_on = f"then continue from {done.name} with --resume" if done else "then start again"
        raise ScaloraError(
            f"output is {str(folder)!r}, which could not be written ({' '.join(str(error).split())[:200]}): make room "
            f"there, {way_on}"
        ) from error


def _of_the_hub(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    return isinstance(error, (HfHubHTTPError, LocalTokenNotFoundError))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; one that was being written when the run was killed is not."""
    return max(filter(is_sealed, _checkpoints(folder)), key=_step, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in (folder / CHECKPOINTS).glob("checkpoint-*") if path.is_dir()]


def _remove_unfinished(folder: Path) -> None:
    for checkpoint in _checkpoints(folder):
        if processes.is_first() and not is_sealed(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _check_resumable(folder: Path, recipe: Recipe) -> None:
    if (folder / METRICS).exists():
        raise ScaloraError(
            f"the run in {str(folder)!r} is finished: there is nothing to resume (--overwrite starts anew)"
        )
    if last_checkpoint(folder) is None:
        raise ScaloraError(f"there is no checkpoint in {str(folder)!r} to resume from: start it without --resume")
    saved = _saved_recipe(folder)
    for key, value in recipe.model_dump(mode="json").items():
        if saved.get(key) != value:
            raise ScaloraError(
                f"{key} is {_differing(value, saved.get(key))} in the run in {str(folder)!r}: "
                "resume with the same recipe"
            )


def _differing(mine: Any, theirs: Any) -> str:
    """Both values; of two sections those of the first key in which they differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        key = next(key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key))
        return f"not the same: its {key} is {_differing(mine.get(key), theirs.get(key))}"
    return f"{mine!r}, but {theirs!r}"


def saved_precision(folder: Path) -> Precision | None:
    """What the run in a folder computes in, to resume it alike; None where there is no run.


    Raises:
        ScaloraError: its recipe was changed, or no longer says it.
    """
    if not (folder / RECIPE).exists():
        return None
    precision = _saved_recipe(folder)["precision"]
    return None if precision == "auto" else precision


def _saved_recipe(folder: Path) -> dict[str, Any]:
    from .recipe import parse_recipe
    from .stored import of_today, says_precision
    from .yaml_words import load_written

    file = folder / RECIPE
    try:
        saved = dict(load_written(file.read_text(encoding="utf-8")))
        known = says_precision(saved)
        recipe = parse_recipe(of_today(saved)).model_dump(mode="json")
    except (yaml.YAMLError, TypeError, ValueError, AttributeError, ScaloraError) as error:
        raise ScaloraError(f"{file} is not the recipe that the run wrote: put it back to resume") from error
    if not known:  # it was settled when the run began, and may be any
        raise ScaloraError(
            f"{file} has no precision, and a run goes on in the one that it began with: put the line back; the run "
            "named it first of all (one of the version before the field, without bf16 or fp16: float32)"
        )
    return recipe


def _sound_checkpoint(folder: Path) -> Path:
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None
    if reason := damage(checkpoint):
        raise ScaloraError(f"{checkpoint} is damaged ({reason}): delete it to resume from the checkpoint before it")
    # Each process has a random state of its own there.
    if (then := len(list(checkpoint.glob("rng_state*.pth")))) != (now := processes.count()):
        raise ScaloraError(
            f"{checkpoint} is of a run on {then} {'process' if then == 1 else 'processes'}, and this is one on {now}: "
            "resume it on as many, since the batch of a step is theirs together"
        )
    return checkpoint
