"""Sixteen hex digits that tell one set of weights from another, from shapes and a sample of values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .layout import is_plain
from .sharding import is_sharded

SAMPLE = 64  # values of each weight that count
_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "base_layer.")  # compile's, DDP's and PEFT's


def fingerprint(weights: Iterable[tuple[str, Tensor]], kind: str = "") -> str:
    """A digest of names, shapes and sampled values, whatever the weights' order and device.

    Values are rounded to bfloat16, so that float32 and bfloat16 copies of one model agree; those of quantised or
    sharded weights do not count.
    """
    hasher = hashlib.sha256(kind.encode())
    for name, weight in sorted(weights, key=lambda item: item[0]):
        if is_sharded(weight) or not is_plain(weight):
            hasher.update(name.encode())  # their shapes and values depend on the packing
            continue
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]
        hasher.update(f"{name}{tuple(weight.shape)}".encode())
        hasher.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return hasher.hexdigest()[:16]


def base_fingerprint(model: nn.Module, written: Iterable[Tensor] = ()) -> str:
    """The fingerprint of what adapters stand on: the frozen weights of a PEFT model, without the adapters'.

    Args:
        model: possibly wrapped or compiled; names are taken without the wrappers.
        written: weights that training writes to, which therefore do not count.
    """
    skipped = {id(weight) for weight in written}
    return fingerprint(
        (_plain_name(name), weight)
        for name, weight in model.named_parameters()
        if id(weight) not in skipped
        and not weight.requires_grad
        and ".lora_" not in name
        and ".accumulated." not in name
        # What stands in for a trained copy (modules_to_save): a classification head may have started at random.
        and ".original_module." not in name
    )


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
