"""ScaLoRA (arXiv 2510.23818) on unforked PEFT: low-rank adapters whose steps add up to a high-rank update.

scalora.attach(model, optimizer)                 any PyTorch loop
Trainer(..., callbacks=[scalora.ScaLoraCallback()])   transformers' Trainer and TRL's trainers
scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=2e-4)   PEFT's own form
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as type checkers understand it, without the time that importing typing takes
if TYPE_CHECKING:
    from typing import Any

    from .common.errors import ScaloraError
    from .engine.attach import attach, create_scalora_optimizer, prepare
    from .engine.config import ScaLoraConfig
    from .engine.event import ScaLora
    from .engine.plain_lora import save_plain_lora
    from .engine.trainer import ScaLoraCallback
    from .layers.lora_forward import fuse_lora
    from .runs.export.load import load

__version__ = "0.1.0"

_HOME = {
    "attach": "engine.attach",
    "prepare": "engine.attach",
    "create_scalora_optimizer": "engine.attach",
    "ScaLora": "engine.event",
    "ScaLoraConfig": "engine.config",
    "ScaLoraCallback": "engine.trainer",
    "save_plain_lora": "engine.plain_lora",
    "load": "runs.export.load",
    "fuse_lora": "layers.lora_forward",
    "ScaloraError": "common.errors",
}
__all__ = [
    "ScaLora",
    "ScaLoraCallback",
    "ScaLoraConfig",
    "ScaloraError",
    "attach",
    "create_scalora_optimizer",
    "fuse_lora",
    "load",
    "prepare",
    "save_plain_lora",
]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and peft take seconds, `scalora --help` must not wait for them."""
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
