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


def byte_level(**normalizer):
    """Tokens of bytes and words, spaces kept, as most language models have them; `ending` adds <bos> and <eos>."""
    from tokenizers import decoders, normalizers, processors, trainers

    ending = normalizer.pop("ending", False)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if normalizer:
        (name,) = normalizer
        inner.normalizer = getattr(normalizers, name)()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(["Question: 123 apples Answer:\n\n negative hello world yes no 12 23 123"] * 8, trainer)
    if ending:
        ends = [("<bos>", 1), ("<eos>", 2)]
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
