"""Tiny models of the three architectures, made on the spot, with LoRA around them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 64
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "bert": ["query", "value", "intermediate.dense", "output.dense"],
    "gpt2": ["c_attn", "c_fc"],  # Conv1D: weights stored in×out
}


def base(kind: str, dtype: torch.dtype = torch.float32, layers: int = 2):
    torch.manual_seed(1)
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))
    elif kind == "bert":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **sizes, **quiet))
    else:
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=32, **quiet)
        )
    return model.to(dtype)


def lora(kind: str, dtype: torch.dtype = torch.float32, layers: int = 2, **options):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind]}
    if kind == "bert":
        defaults["task_type"] = "SEQ_CLS"  # PEFT then trains the classifier too (modules_to_save)
    if kind == "gpt2":
        defaults["fan_in_fan_out"] = True
    torch.manual_seed(2)
    return get_peft_model(base(kind, dtype, layers), LoraConfig(**{**defaults, **options}))


def batch(kind: str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (4, 12), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 3 if kind == "bert" else ids}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, kind: str, steps: int, *, start: int = 0) -> float:
    """Ordinary training steps on a fresh batch each; the last loss."""
    loss = torch.tensor(0.0)
    for step in range(start, start + steps):
        loss = model(**batch(kind, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def logits(model, kind: str, seed: int = 99):
    training = model.training
    out = model.eval()(input_ids=batch(kind, seed)["input_ids"]).logits.float()
    model.train(training)
    return out
