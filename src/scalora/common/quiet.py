"""Keeping libraries' chatter out of our output."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Keep libraries' progress bars and warnings out of our output; SCALORA_VERBOSE=1 lets them through."""
    if os.environ.get("SCALORA_VERBOSE"):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
