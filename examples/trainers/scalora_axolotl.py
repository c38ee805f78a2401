"""ScaLoRA as a plugin of axolotl: `plugins: [scalora_axolotl.ScaloraPlugin]`, with this folder on PYTHONPATH.

    PYTHONPATH=examples/trainers axolotl train examples/trainers/axolotl.yaml

The key `scalora` of the configuration holds fields of ScaLoraConfig.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import scalora

# They compute adapters from the two matrices alone, past the layer and what it has accumulated.
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
OTHERS = ("peft_use_dora", "relora")


class ScaloraArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    scalora: dict[str, Any] | None = None


class ScaloraPlugin(BasePlugin):
    """Adds the callback, and keeps axolotl from switching its fused LoRA kernels on.

    `adapter: scalora` means LoRA with this plugin. Where axolotl cannot load a plugin it says so in one line and goes
    on without it; an adapter that it does not know stops it.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.ScaloraArgs"

    def register(self, cfg: dict[str, Any]) -> None:
        """Raises ValueError where what is asked for cannot be rescaled or saved; other kernels are switched off."""
        for name in ("fsdp_config", "fsdp_version", "fsdp"):
            if cfg.get(name):
                raise ValueError(
                    f"{name} is {cfg[name]!r}: axolotl's last save under FSDP leaves out what ScaLoRA has accumulated; "
                    "use DDP, or scalora train with FSDP2"
                )
        for name in (*KERNELS, *OTHERS):
            if cfg.get(name):
                raise ValueError(f"{name} is {cfg[name]!r}, which ScaLoRA cannot go with: leave it out or set it false")
        for name in KERNELS:
            cfg[name] = False  # unset, axolotl sets it true
        if cfg.get("adapter") == "scalora":
            cfg["adapter"] = "lora"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Before the trainer, which may wrap the model."""
        return [scalora.ScaLoraCallback(dict(cfg.scalora or {}))]
