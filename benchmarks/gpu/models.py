"""Llama models of random weights, made where they are used; and batches for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 1024  # small: a step is that of the adapted layers
LENGTH = 1024  # tokens of a text, at most

# Billions of weights, about → Llama's sizes: of SmolLM2's kind, Llama 3.2's and Llama 3's, but for the vocabulary.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "0.1": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "1": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}  # fmt: skip


def random_model(size: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Made on the device, in the dtype: no larger copy exists anywhere in between."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, use_cache=False, **SIZES[size])
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(former)


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own around the same tensors, so that each method adapts the one base in its own way."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def weight_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def random_batch(tokens: int, device: str, seed: int) -> dict[str, Tensor]:
    """Texts of at most 1,024 tokens, as many as it takes."""
    length = min(LENGTH, tokens)
    ids = torch.randint(VOCABULARY, (tokens // length, length), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(device)
    return {"input_ids": ids, "labels": ids}
