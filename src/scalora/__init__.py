"""ScaLoRA (arXiv 2510.23818) on unforked PEFT: low-rank adapters whose steps add up to a high-rank update.

scalora.attach(model, optimizer)                 any PyTorch loop
Trainer(..., callbacks=[scalora.ScaLoraCallback()])   transformers' Trainer and TRL's trainers
scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=2e-4)   PEFT's own form
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ScaLoraConfig
    from .engine import ScaLora, attach, prepare
    from .errors import ScaloraError
    from .integrations.peft_optimizer import create_scalora_optimizer
    from .integrations.trainer import ScaLoraCallback
    from .plain import save_plain_lora

__version__ = "0.1.0"

_HOME = {
    "attach": "engine",
    "prepare": "engine",
    "ScaLora": "engine",
    "ScaLoraConfig": "config",
    "ScaLoraCallback": "integrations.trainer",
    "create_scalora_optimizer": "integrations.peft_optimizer",
    "save_plain_lora": "plain",
    "ScaloraError": "errors",
}
__all__ = [
    "ScaLora",
    "ScaLoraCallback",
    "ScaLoraConfig",
    "ScaloraError",
    "attach",
    "create_scalora_optimizer",
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
