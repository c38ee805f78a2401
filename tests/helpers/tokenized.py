"""Tiny random models and a word tokenizer, made on the spot."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = [*"the cat dog sat ran on mat sky is blue red yes no why what who".split(), *"abcdefgh"]  # noqa: SIM905
SIZE = 4 + len(WORDS)


def tokenizer():
    """One token a word; the space before it is dropped. No special token is added."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def llama(tied=False):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    config.initializer_range = 0.5  # far from uniform, so that positions and padding matter
    return LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    )


def bert(num_labels=2):
    torch.manual_seed(3)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=SIZE,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=num_labels,
            initializer_range=0.5,
        )
    )


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
