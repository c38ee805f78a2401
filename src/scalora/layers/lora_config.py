"""What PEFT's adapter_config.json says of a LoRA, read without importing PEFT, which takes seconds."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ..common.disk_layout import FORMER_PAIR
from ..common.errors import ScaloraError

# Fields of LoraConfig that, when set, make it more than s·A Bᵀ on linear layers.
VARIANTS = (
    "use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "use_qalora", "alora_invocation_tokens",
    "arrow_config", "layer_replication", "use_bdlora", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
UNREADABLE = "LORA, of which a part lies beside it: load this folder with scalora.load"  # a peft_type, where so


def refuse_former_pair(folder: Path) -> None:
    """Refuse a folder in which PEFT would find half of an update.

    Raises:
        ScaloraError: the other half lies in a folder of its own.
    """
    if (folder / FORMER_PAIR).is_dir():
        raise ScaloraError(
            f"{folder} holds half of an update, the other in {FORMER_PAIR}/, as scalora once wrote it: load it with "
            "the version that wrote it, and save it with scalora.save_plain_lora"
        )


def scale(config: dict[str, Any], name: str, rank: int | None = None) -> float:
    """s of a layer, of that rank or of the one that the configuration gives it."""
    rank = rank or int(_of_layer(config, "rank_pattern", name, config["r"]))
    alpha = _of_layer(config, "alpha_pattern", name, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(config: dict[str, Any], field: str, name: str, otherwise: float) -> float:
    """As PEFT finds it (``get_pattern_key``; PEFT itself would take seconds to import)."""
    patterns = config.get(field) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)
