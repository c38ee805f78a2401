"""Tiny mixtures of experts, with LoRA on one linear layer, and on the experts' parameters."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import scalora
from helpers import models
from scalora import ScaLoraConfig

_SIZES = {
    "vocab_size": models.VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **_SIZES)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, **_SIZES)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=4, **_SIZES)),  # stores in × out
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def base(kind):
    torch.manual_seed(1)
    return MIXTURES[kind]()


def lora(kind, **options):
    made = base(kind)
    torch.manual_seed(2)
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": EXPERTS, **options}
    return get_peft_model(made, LoraConfig(**config))


def wrappers(model):
    """Those of the experts, of one module in one another."""
    return [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]


def trained(kind, steps=12, lora_options=None, **config):
    model = lora(kind, **(lora_options or {}))
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(**{"interval": 1, **config}))
    models.train(model, optimizer, "llama", steps)
    return model, optimizer, handle


def outputs(model):
    return models.logits(model, "llama")
