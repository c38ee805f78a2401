"""What makes a model's inputs: tokenizers, and image processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.errors import ScaloraError

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")
"""What tokenizers are read from: one of these files holds their vocabulary."""


def load_tokenizer(source: str, path: str, required: bool) -> Any:
    """The tokenizer of a folder or hub id; None where there is none and none is needed.

    Raises:
        ScaloraError: there is none, and it is needed.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        if not required:
            return None
        if Path(path).is_dir() and not any(each for pattern in _VOCABULARIES for each in Path(path).glob(pattern)):
            raise _no_tokenizer(source) from error
        raise
    # Some classes (BERT's) make one of special tokens alone where there are no files.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        if required:
            raise _no_tokenizer(source)
        return None
    return tokenizer


def _no_tokenizer(source: str) -> ScaloraError:
    return ScaloraError(
        f"model: {source!r} has no tokenizer: none of {', '.join(_VOCABULARIES)} is there; put the files of its "
        "tokenizer beside its weights (tokenizer.save_pretrained writes them)"
    )


def with_padding(source: str, model: Any, tokenizer: Any) -> Any:
    """The tokenizer, which pads on the right from here on, and has a token for it that the model knows.

    Raises:
        ScaloraError: it has no token that could be taken.
    """
    rows = vocabulary(model)
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        # Often a pad token was added to a tokenizer, and no row for it to the embeddings. Padding is masked out of
        # attention and loss everywhere, so any token will do; eos is the customary one.
        if tokenizer.eos_token_id is None:
            raise ScaloraError(
                f"model: the tokenizer of {source!r} has neither a pad nor an eos token that the model has an "
                "embedding for; add a pad token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    # Decoders with a classification head find a row's last token by comparing with this id.
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def vocabulary(model: Any) -> int | None:
    """For how many tokens a model has input embeddings; None where its configuration does not call that so (CANINE)."""
    stated = getattr(model.config.get_text_config(), "vocab_size", None)
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None
    return rows if stated is not None and rows is not None and rows >= stated else None


def image_processor(path: str) -> Any:
    """What makes an image model's inputs; always by Pillow, so that they do not depend on what else is installed."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(path, backend="pil")
