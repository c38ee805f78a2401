"""Full float32 products inside an event, whatever autocast or TF32 are set to."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_matmul(device: torch.device) -> Generator[None]:
    """Full float32 products: neither autocast nor lowered precision, where a user allows them, may blur an event."""
    with torch.autocast(device.type, enabled=False), _full_precision():
        yield


@contextmanager
def _full_precision() -> Generator[None]:
    if hasattr(torch.backends, "fp32_precision"):  # torch 2.9; the older functions fail where the user has set this
        backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
    else:
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
