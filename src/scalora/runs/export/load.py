"""Whatever scalora or PEFT has saved, as a model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...common.errors import ScaloraError


def load(path: str | Path, base: str | None = None) -> Any:
    """The trained model that lies in a folder, in evaluation mode on the CPU.

    Args:
        path: a run (its result, or its newest checkpoint where it has none yet), a checkpoint, an adapter of any of
            PEFT's types, an adapter with layers of its own (mora, alpha-lora), a whole model, or an export.
        base: where the base model lies, if not where it lay in training. A whole model needs none.

    Returns:
        A PeftModel where PEFT's adapters were saved, else transformers' model.

    Raises:
        ScaloraError: nothing of that kind lies there, it is incomplete or damaged, it does not fit its base model, or
            packages are missing.

    Example:
        >>> model = scalora.load("runs/demo")
    """
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
    source = Base(artefact, base, need_tokenizer=False)
    if artefact.kind == "delta":
        return load_delta(artefact.folder, source)
    return restore(artefact, source).model
