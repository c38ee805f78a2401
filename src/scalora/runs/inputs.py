"""What a run reads, in digests: so that what goes on is seen to go on with the same data, tokenizer and base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..common.errors import ScaloraError
from ..models.base_print import fingerprint_as
from ..tasks.data.rows import digest_rows
from .loading import Loaded


@dataclass(frozen=True)
class Inputs:
    """Digests of what is read; they depend neither on the machine nor on where files lie."""

    data: Mapping[str, str]
    """Of each split: how many rows, and a digest of the columns that are used (and the images), in their order."""
    tokenizer: str | None
    """Of its vocabulary and of the tokens that it makes of the rows, or of an image processor's settings; None where
    the model reads vectors."""
    base_model: str
    """The fingerprint of its weights (a sample of each) as they were loaded, and what they are rounded to."""

    @classmethod
    def of(cls, loaded: Loaded) -> Inputs:
        """Those of a recipe that was just loaded, before its model is adapted."""
        data = {
            split: digest_rows(loaded.task.rows(split)) + dataset.content()
            for split, dataset in loaded.datasets.items()
        }
        return cls(data, _digest_tokens(loaded), fingerprint_as(loaded.model, loaded.quantization))

    def encode(self) -> dict[str, Any]:
        return asdict(self)

    def refuse_other(self, stored: Any, whose: str, way_out: str) -> None:
        """Compare with what was stored; ``whose`` says of what, as "the run in 'runs/mine'".

        Raises:
            ScaloraError: something differs, or what is stored are no such digests; the message names it.
        """
        try:
            theirs = Inputs(dict(stored["data"]), stored["tokenizer"], stored["base_model"])
        except (KeyError, TypeError, ValueError) as error:
            raise ScaloraError(f"{whose} has no readable digests of its inputs ({error!r}): {way_out}") from error
        found = [
            f"the data of {split} are others than those of {whose} ({self.data.get(split, 'none')}; there "
            f"{theirs.data.get(split, 'none')})"
            for split in {**self.data, **theirs.data}
            if self.data.get(split) != theirs.data.get(split)
        ]
        if not found and self.tokenizer != theirs.tokenizer:  # of other data it makes other tokens
            found = [f"the tokenizer is another than that of {whose} ({self.tokenizer}, there {theirs.tokenizer})"]
        if self.base_model != theirs.base_model:
            found.append(
                f"the base model is another than that of {whose} (fingerprint {self.base_model}, there "
                f"{theirs.base_model})"
            )
        if found:
            raise ScaloraError(f"{'; '.join(found)}: {way_out}")


def _digest_tokens(loaded: Loaded) -> str | None:
    if loaded.tokenizer is None:
        return None
    reader = loaded.tokenizer
    about = sorted(reader.get_vocab().items()) if hasattr(reader, "get_vocab") else reader.to_dict()
    hasher = hashlib.sha256(json.dumps(about, default=str).encode())
    for dataset in loaded.datasets.values():
        for part in dataset.token_bytes():
            hasher.update(part)
    return hasher.hexdigest()[:16]
