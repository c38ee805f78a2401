"""Base models whose linear weights bitsandbytes or torchao keeps packed, as transformers loads them."""

from __future__ import annotations

from importlib.util import find_spec
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from ..common.errors import ScaloraError

Quantization = Literal["none", "nf4-rounded", "nf4", "int8", "float8"]
LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}
"""Which library packs: NF4 with doubly quantised scales; integers and float8 of 8 bits with a scale for each row."""
_BLOCK = 64  # entries of NF4 that share a scale


def is_packed(quantization: str) -> bool:
    """Whether weights are kept in few bits, and not just rounded."""
    return quantization in LIBRARIES


def packing(quantization: str, compute: torch.dtype, kept: list[str]) -> Any:
    """transformers' configuration that loads a model so.

    Args:
        quantization: one of :data:`LIBRARIES`.
        compute: what products are made in.
        kept: names of linear layers that stay as they are.

    Raises:
        ScaloraError: the library is not installed.
    """
    library = LIBRARIES[quantization]
    if find_spec(library) is None:
        raise ScaloraError(
            f"quantization is {quantization!r}, which needs {library}: pip install 'scalora[quantised]', or "
            f"{_otherwise(quantization)}"
        )
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=kept,
        )
    import torchao.quantization as ao  # pyright: ignore[reportMissingImports]

    config = ao.Int8WeightOnlyConfig() if quantization == "int8" else ao.Float8WeightOnlyConfig()
    return TorchAoConfig(config, modules_to_not_convert=kept)


def outside_backbone(cls: Any, configuration: Any) -> list[str]:
    """Names of the linear layers that are not the backbone's, and of its poolers, which may start at random.

    Args:
        cls: transformers' Auto class.
        configuration: of the model, of which nothing is loaded.
    """
    with torch.device("meta"):
        empty = cls.from_config(configuration)
    prefix = f"{empty.base_model_prefix}."
    return [
        name
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear) and (not name.startswith(prefix) or "pool" in name.removeprefix(prefix))
    ]


def cannot_pack(quantization: str, source: str, error: Exception) -> ScaloraError:
    """The message about a model that the library, or this device, does not take."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ScaloraError(
        f"quantization is {quantization!r}, with which {LIBRARIES[quantization]} cannot load {source!r} here "
        f"({reason}): {_otherwise(quantization)}"
    )


def settle(model: nn.Module, quantization: str) -> None:
    """See to it that a freshly loaded packed model stays packed as it is.

    Raises:
        ScaloraError: nothing is packed.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore  # it would repack for inference, for good
    if not packed_modules(model):
        raise ScaloraError(
            f"quantization is {quantization!r}, but this model has no linear layer that can be packed: "
            f"{_otherwise(quantization)}"
        )


def refuse_rows_of_odd_length(model: nn.Module) -> None:
    """Raises ScaloraError where bitsandbytes would mix up the scales of a layer, which it does on CPUs alone."""
    for name, module in packed_modules(model).items():
        n = getattr(module, "in_features", 0)
        if hasattr(module.weight, "quant_state") and n % _BLOCK:
            raise ScaloraError(
                f"quantization is 'nf4', but {name} has {n} inputs, and on a CPU bitsandbytes computes multiples of "
                f"{_BLOCK} only: {_otherwise('nf4')}"
            )


def packed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weight is packed, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (hasattr(module.weight, "quant_state") or type(module.weight).__module__.startswith("torchao."))
    }


@torch.no_grad()
def unpack(packed: nn.Module, into: nn.Module) -> None:
    """Give the weights of a float model the values that the same model has when it is packed.

    Raises:
        ScaloraError: as :func:`refuse_rows_of_odd_length`.
    """
    refuse_rows_of_odd_length(packed)
    for name, module in packed_modules(packed).items():
        weight: Any = into.get_submodule(name).weight
        values = unpacked(module)
        weight.copy_(values if values.shape == weight.shape else values.mT)  # GPT-2's Conv1D is packed turned


def unpacked(module: Any) -> Tensor:
    """The values of a packed weight, out × in."""
    if (state := getattr(module.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

        return dequantize_4bit(module.weight.data, state)
    return module.weight.dequantize()


def entries(parameter: Tensor) -> int:
    """How many numbers a parameter is of, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def _otherwise(quantization: str) -> str:
    rounded = "nf4-rounded, the same values in float memory" if quantization == "nf4" else "none"
    return f"set quantization: {rounded}"
