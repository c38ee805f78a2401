"""The methods that are compared, each settled on the one base model."""

from __future__ import annotations

import gc
from typing import NamedTuple

import torch

from ..cost.overhead import REFERENCE
from ..cost.runner import Runner
from .budget import Budget
from .failures import Failures
from .models import random_batch, random_model, sharing_weights, weight_bytes

METHODS = (
    REFERENCE, "scalora-i", "scalora-i:kept", "scalora", "scalora-i:base", "scalora-refresh", "white-lora", "hira",
)  # fmt: skip
PRECISIONS = {"bf16 base": torch.bfloat16, "autocast": torch.float32}  # of the base; autocast is to bf16
FEW = 512  # tokens, at most, where their number does not matter


class Cell(NamedTuple):
    """What one comparison is made with."""

    size: str
    precision: str
    rank: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.size}, {self.precision}, r = {self.rank}, {self.tokens} tokens"

    @property
    def model(self) -> tuple[str, str, int]:
        """What the methods can be kept for."""
        return self[:3]

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed twice rather than kept: else the largest would not fit."""
        return self.size == "8" and (self.tokens > 4096 or self.precision == "autocast")


class Rivals:
    """Every method on the one base; what fails is noted and left out."""

    def __init__(self, cell: Cell, device: str, budget: Budget, failures: Failures) -> None:
        self.cell, self.device, self.budget, self.failures = cell, device, budget, failures
        gc.collect()  # the former ones: their hooks and handles form cycles
        if device == "cuda":
            torch.cuda.empty_cache()
        self.base = random_model(cell.size, PRECISIONS[cell.precision], device)
        self.base_bytes = weight_bytes(self.base)
        self.runners: dict[str, Runner] = {}
        self.own_bytes: dict[str, int] = {}  # of adapters, optimizer's state and accumulated columns
        self.event_bytes: dict[str, int] = {}  # that an event takes at most, above what lies there between steps
        self.event_seconds: dict[str, float] = {}  # per step
        self.checkpointing = False
        self.batch = random_batch(min(cell.tokens, FEW), device, 0)
        for name in METHODS:
            budget.ask()
            before = allocated(device)
            with failures.noting(cell, name):
                runner = make_runner(name, cell, sharing_weights(self.base))
                runner.settle(self.batch)
                self.runners[name] = runner
                self.own_bytes[name] = allocated(device) - before


def make_runner(name: str, cell: Cell, model: torch.nn.Module) -> Runner:
    """One method on a model in this cell's precision."""
    autocast = "bf16" if cell.precision == "autocast" else "fp32"
    return Runner(name, model, "causal-lm", cell.rank, autocast)  # pyright: ignore[reportArgumentType]


def allocated(device: str) -> int:
    """Bytes on a CUDA device; on a CPU none are counted."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    """The most bytes allocated since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
