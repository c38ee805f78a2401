"""Precision inside an event: full float32 products whatever is set, and factors that an adapter can hold."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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


def representable(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor, float64, as the adapter's dtype will hold it.

    In bf16 and fp16 a general factor would round every entry of the adapter; powers of two round none.
    """
    if torch.finfo(dtype).bits < 32:
        return torch.exp2(torch.log2(factor).round())
    return factor.to(dtype).double()
