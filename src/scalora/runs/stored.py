"""Recipes as earlier versions have stored them; read by what must not load a model's libraries."""

from __future__ import annotations

from typing import Any

from .precision import Precision

FLAGS: dict[str, Precision] = {"bf16": "bfloat16", "fp16": "float16"}  # of TrainingArguments
FORMERLY, _RENAMED = "base_weights", {"float": "none", "nf4": "nf4-rounded"}  # what quantization was called


def of_today(content: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe's content in today's fields, with the precision of its day.

    That is float32 unless its training section had a flag.
    """
    flags = [precision for flag, precision in FLAGS.items() if (content.get("training") or {}).get(flag)]
    rest = {key: value for key, value in content.items() if key != FORMERLY}
    if content.get(FORMERLY) in _RENAMED:
        rest["quantization"] = _RENAMED[content[FORMERLY]]
    return {"precision": flags[0] if flags else "float32"} | rest


def says_precision(content: dict[str, Any]) -> bool:
    """Whether a stored recipe tells its precision, by the field or by a flag of its training section."""
    return "precision" in content or not FLAGS.keys().isdisjoint(content.get("training") or {})
