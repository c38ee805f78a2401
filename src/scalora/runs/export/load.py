"""Whatever scalora or PEFT has saved, as a model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...common.errors import ScaloraError, named


def load(path: str | Path, base: str | Path | None = None) -> Any:
    """The trained model that lies in a folder, in evaluation mode on the CPU.

    Args:
        path: a run (its result, or its newest checkpoint where it has none yet), a checkpoint, an adapter of any of
            PEFT's types, an adapter with layers of its own (mora, alpha-lora), a whole model, or an export.
        base: the folder or name of the base model, if not that of the training. A whole model needs none.

    Returns:
        A PeftModel where PEFT's adapters were saved, else transformers' model.

    Raises:
        ScaloraError: nothing of that kind lies there, it is incomplete or damaged, it does not fit its base model, or
            packages are missing.

    Example:
        >>> model = scalora.load("runs/demo")
    """
    if base is not None and (not isinstance(base, str | Path) or not str(base)):
        raise ScaloraError(
            f"base is {named(base)}: give the folder or the name of the base model; onto a model that is loaded "
            "already, put an adapter with PeftModel.from_pretrained(model, path)"
        )
    try:
        from .artefact import find_artefact
        from .base_model import Base
        from .restored import load_delta, load_whole
        from .restored_peft import restore
    except ImportError as error:
        raise ScaloraError(f"scalora.load needs {error.name}: pip install 'scalora[cli]'") from error
    artefact = find_artefact(path)
    if artefact.kind == "model":
        return load_whole(artefact)
    source = Base(artefact, None if base is None else str(base), need_tokenizer=False)
    if artefact.kind == "delta":
        return load_delta(artefact.folder, source)
    return restore(artefact, source).model
