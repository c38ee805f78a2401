"""Is a recipe for a large model sound? Its architecture on the meta device, and arithmetic, tell without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import DebertaV2Config, Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from scalora.common.errors import ScaloraError
from scalora.methods import MethodSpec
from scalora.methods.support.targets import find_targets
from scalora.models.heads import Head, auto_class
from scalora.runs.recipe import Recipe

# The published configurations, as far as shapes go, by hub id.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "microsoft/deberta-v3-base": lambda: DebertaV2Config.from_dict(
        {
            "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 0,
            "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "pooler_hidden_size": 768,
        }
    ),
    "meta-llama/Llama-2-7b-hf": lambda: LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "meta-llama/Meta-Llama-3-8B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "google/gemma-3-12b-pt": lambda: Gemma3TextConfig(  # without the vision tower, which stays out of training
        vocab_size=262208, hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a recipe would train and take; bytes are estimates, ``tokens`` an upper bound (every row at max_length)."""

    model: str
    modules: int
    adapter_parameters: int
    parameters: int
    bytes: int
    tokens: int

    def row(self) -> list[str]:
        return [
            str(self.modules), f"{self.adapter_parameters / 1e6:.2f} M", f"{self.parameters / 1e9:.2f} B",
            f"{self.bytes / 2**30:.1f} GiB", f"{self.tokens / 1e6:.0f} M",
        ]  # fmt: skip


PLAN_TITLE = "adapted modules, parameters of LoRA's adapters and of the model; memory is an estimate, tokens at most"
PLAN_COLUMNS = ("modules", "adapters", "weights", "memory", "tokens")


def plan(recipe: Recipe, head: Head, rows: int) -> Plan:
    """Build the recipe's model on the meta device and count what LoRA would train on its target modules.

    Memory: weights in the recipe's dtype; 16 bytes per adapter parameter (value, gradient, Adam's two moments);
    activations by 34·layers·hidden bytes per token of a micro-batch (Korthikanti et al. 2205.05198, half precision,
    without attention's square part).

    Args:
        recipe: its model must be one of ``CONFIGS``.
        head: what the task needs.
        rows: training rows.

    Raises:
        ScaloraError: the model's configuration is not known here, or no module is targeted.
    """
    targets = recipe.method.target_modules
    shapes, parameters, width = _architecture(
        recipe.model, head, targets if isinstance(targets, str) else tuple(targets)
    )
    adapters = sum(recipe.method.rank * (m + n) for m, n in shapes)
    length: int = getattr(recipe.task, "max_length")  # noqa: B009  (every token task has one)
    activations = 34 * width * length * recipe.training.get("per_device_train_batch_size", 8)
    weights = parameters * (4 if recipe.dtype == "float32" else 2)
    tokens = int(rows * recipe.training.get("num_train_epochs", 1) * length)
    return Plan(recipe.model, len(shapes), adapters, parameters, weights + 16 * adapters + activations, tokens)


@cache
def _architecture(name: str, head: Head, target_modules: str | tuple[str, ...]) -> tuple[list[torch.Size], int, int]:
    """Shapes of the targeted weights, parameters in all, layers times hidden size."""
    if name not in CONFIGS:
        raise ScaloraError(f"model is {name!r}: only {', '.join(CONFIGS)} can be planned without weights")
    config: Any = CONFIGS[name]()
    with torch.device("meta"):
        model: Any = auto_class(head).from_config(config)
    spec = MethodSpec(
        name="lora", target_modules=target_modules if isinstance(target_modules, str) else list(target_modules)
    )
    shapes = [module.weight.shape for _, module in find_targets(model, spec, head)]
    return shapes, sum(p.numel() for p in model.parameters()), config.num_hidden_layers * config.hidden_size
