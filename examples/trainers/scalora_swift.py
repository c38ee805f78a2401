"""ScaLoRA in ms-swift: an external plugin that adds one name to its callbacks.

    swift sft --external_plugins examples/trainers/scalora_swift.py --callbacks scalora --tuner_type lora …

swift.sh beside this file has the whole command.
"""

from __future__ import annotations

from typing import Any

from swift.callbacks import callbacks_map

import scalora

CONFIG = {"interval": 10}  # fields of ScaLoraConfig; {} for its defaults


def make(args: Any, trainer: Any) -> scalora.ScaLoraCallback:
    """What ms-swift calls for each of its trainers, before transformers' own is set up."""
    return scalora.ScaLoraCallback(CONFIG)


callbacks_map["scalora"] = make
