"""Which modules a recipe means, for the methods that do without PEFT; matched by PEFT's own rules."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,  # pyright: ignore[reportPrivateUsage]
    check_target_module_exists,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...common.errors import ScaloraError
from ...models.heads import HEADS, Head, find_heads, is_within
from ..method import MethodSpec


def find_targets(model: PreTrainedModel, spec: MethodSpec, head: Head) -> list[tuple[str, nn.Linear | Conv1D]]:
    """The linear modules that ``target_modules`` names, without those that are trained as a whole.

    Raises:
        ScaloraError: there are none.
    """
    heads = {name for name, _ in find_heads(model, head)}
    config = LoraConfig(target_modules=spec.target_modules, task_type=HEADS[head].task_type)
    config = _maybe_include_all_linear_layers(config, model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not is_within(name, heads)
        and check_target_module_exists(config, name)
    ]
    if not found:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
        raise ScaloraError(
            f"method.target_modules is {spec.target_modules!r}, which no linear module of this model matches; it has "
            f"{', '.join(linear) or 'none'}{spec.targets_hint}"
        )
    return found
