"""What a model computes: a head by its name."""

from __future__ import annotations

from typing import Literal

Head = Literal["causal-lm", "sequence-classification"]
