"""The precision a run computes in: the fastest of its device that does not lose the run, or what the recipe orders.

It is that of products under autocast. The recipe's `dtype` is that of the stored base weights.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

Precision = Literal["float32", "bfloat16", "float16"]
AUTOCAST: dict[Precision, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_X86 = ("x86_64", "amd64", "i386", "i686")
# Values of ONEDNN_MAX_CPU_ISA at which torch calls bf16 supported, although oneDNN emulates it.
_EMULATED = ("AVX512_CORE", "AVX512_CORE_VNNI")


class Device(NamedTuple):
    """What decides on the precision.

    `kind` is torch's name of the device type. `native_bf16`: its hardware multiplies bf16, and torch uses that.
    """

    kind: str
    native_bf16: bool


class PrecisionChoice(NamedTuple):
    """A precision, and why it was taken."""

    precision: Precision
    reason: str

    def __str__(self) -> str:
        return f"{self.precision} ({self.reason})"


def choose(device: Device) -> PrecisionChoice:
    """bf16 where the device computes it natively, else float32; never fp16, whose narrow range can lose a run."""
    names = {"cpu": "this CPU", "cuda": "this GPU", "xpu": "this GPU"}
    if device.kind not in names:
        return PrecisionChoice("float32", f"bf16 on {device.kind} is untried")
    if device.native_bf16:
        return PrecisionChoice("bfloat16", f"{names[device.kind]} computes bf16 natively")
    return PrecisionChoice("float32", f"{names[device.kind]} has no native bf16")


def decide(asked: str, training: Mapping[str, Any], recorded: Precision | None = None) -> PrecisionChoice:
    """The precision of a run.

    Args:
        asked: a Precision, or "auto".
        training: the recipe's training arguments, of which `use_cpu` counts.
        recorded: the precision of the run or comparison that is continued; "auto" keeps to it.
    """
    for precision in AUTOCAST:
        if asked == precision:
            return PrecisionChoice(precision, "as the recipe says")
    if recorded is not None:
        return PrecisionChoice(recorded, "as what is continued")
    return choose(find_device(cpu=bool(training.get("use_cpu"))))


def find_device(*, cpu: bool = False) -> Device:
    """The device that a run takes on this machine: an accelerator where there is one, unless `cpu`."""
    accelerator = None if cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator else "cpu"
    if kind == "cuda":
        return Device(kind, torch.cuda.is_bf16_supported(including_emulation=False))
    if kind == "xpu":
        return Device(kind, torch.xpu.is_bf16_supported())
    return Device(kind, kind == "cpu" and _cpu_multiplies_bf16())


def _cpu_multiplies_bf16() -> bool:
    """Whether the processor has the instructions and oneDNN may use them.

    torch's own answer follows ONEDNN_MAX_CPU_ISA, but on x86 it is yes from AVX-512 on, bf16 instructions or not.
    """
    try:
        supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if platform.machine().lower() not in _X86:
            return supported
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
        return supported and torch.cpu._is_avx512_bf16_supported() and limit.upper() not in _EMULATED
    except (AttributeError, RuntimeError):  # a torch that was built without oneDNN, or a later one
        return False
