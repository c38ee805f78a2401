"""Conversations, and a tokenizer that has a chat template, made on the spot."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import tokenized

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(*turns):
    """Messages of (role, content) pairs."""
    return [{"role": role, "content": content} for role, content in turns]


TWO_TURNS = said(
    ("system", "be good"), ("user", "hello"), ("assistant", "yes world"), ("user", "no"), ("assistant", " 123 apples\n")
)  # fmt: skip
ONE_TURN = said(("user", "hello world"), ("assistant", "Question: 😀"))


def tokenizer(template=CHATML):
    """Bytes and words, with the tokens that published templates write."""
    made = tokenized.byte_level()
    made.add_tokens(
        ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>"],
        special_tokens=True,
    )
    made.chat_template = template
    return made


def llama():
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0,
    )  # fmt: skip
    config.initializer_range = 0.5
    return LlamaForCausalLM(config)
