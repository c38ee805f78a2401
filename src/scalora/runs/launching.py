"""What accelerate may be configured with for a recipe: DDP, or FSDP2. The rest is refused before anything is loaded."""

from __future__ import annotations

import os
from typing import Any

from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from ..common import processes
from ..common.errors import ScaloraError
from ..methods import all_methods, method_class
from .recipe import Recipe

_FLAGS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's names of precisions


def is_sharding() -> bool:
    """Whether accelerate was told to shard the model over several processes."""
    return processes.count() > 1 and _is_on("ACCELERATE_USE_FSDP")


def refuse_unsupported(recipe: Recipe) -> None:
    """See that a recipe, whose precision is settled, can be trained by the processes as they were started.

    Raises:
        ScaloraError: it cannot; the message names what is in the way.
    """
    if processes.count() == 1:
        return
    for flag, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config"),
    ):
        if _is_on(flag):
            raise ScaloraError(
                f"accelerate is configured with {name}: a recipe is trained with DDP or FSDP2, choose one"
            )
    mixed, own = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), _FLAGS[recipe.precision]
    if mixed not in ("no", own):
        raise ScaloraError(
            f"accelerate is configured with mixed_precision {mixed!r}, but the recipe's precision is "
            f"{recipe.precision!r}: set mixed_precision: 'no' there, and precision in the recipe"
        )
    if method_class(recipe.method.name).alone:
        raise ScaloraError(
            f"method.name is {recipe.method.name!r}, which is trained in one process: start it without torchrun and "
            "accelerate launch, or choose another method"
        )
    if is_sharding():
        _refuse_sharding(recipe)


def _refuse_sharding(recipe: Recipe) -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ScaloraError("accelerate is configured with FSDP1, which flattens the adapters: set fsdp_version: 2")
    if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ScaloraError(
            "accelerate is configured with fsdp_cpu_ram_efficient_loading, with which only the first process has the "
            "model: set it to false"
        )
    if not method_class(recipe.method.name).shards:
        possible = ", ".join(name for name, method in all_methods().items() if method.shards)
        raise ScaloraError(
            f"method.name is {recipe.method.name!r}, which needs whole matrices, and FSDP2 shards them: use DDP "
            f"(torchrun), or choose one of {possible}"
        )
    for field, value, needed in (
        ("quantization", recipe.quantization, "none"),
        ("method.options.accumulate", recipe.method.options.get("accumulate", "adapter"), "adapter"),
    ):
        if value != needed:
            raise ScaloraError(f"{field} is {value!r}, which needs whole weights, and FSDP2 shards them: use DDP")


def shard(trainer: Trainer) -> None:
    """Have FSDP2 shard the model: on CPUs too, where accelerate ignores that it was told so.

    Raises:
        ScaloraError: modules share a weight in a way that accelerate's FSDP2 cannot shard.
    """
    if not is_sharding():
        return
    state = trainer.accelerator.state
    if not trainer.is_fsdp_enabled:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as accelerate launch has set the environment
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    model: Any = trainer.model
    _refuse_shared(model)
    plugin: Any = state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = _blocks(model)


def _blocks(model: Any) -> list[str]:
    """The classes that a model names as its blocks, without those around its input embeddings (BERT, ViT).

    accelerate shards those embeddings by themselves, which fails where they are sharded already.
    """
    named, embeddings = set(getattr(model, "_no_split_modules", None) or ()), model.get_input_embeddings()
    blocks = {type(module).__name__: module for module in model.modules()}
    return sorted(name for name in named & blocks.keys() if embeddings not in set(blocks[name].modules()))


def _refuse_shared(model: Any) -> None:
    """The weight of the input embeddings may be the output's too: accelerate shards both as one, but no third (T5)."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    within = {module for end in ends for module in end.modules()}
    weights = {id(weight) for end in ends for weight in end.parameters()}
    for name, module in model.named_modules():
        if module not in within and any(id(weight) in weights for weight in module.parameters(recurse=False)):
            raise ScaloraError(
                f"model: {name} has the weight of the input embeddings, which FSDP2 cannot shard with a third: use DDP "
                "(torchrun)"
            )


def _is_on(flag: str) -> bool:
    return os.environ.get(flag, "false").lower() in ("true", "1")
