"""Small models of the heads that are no causal language model's, with rows for each, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers import images, tokenized

UNDROPPED = "config={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
TAGS = {"cat": "B-PET", "dog": "B-PET", "sky": "B-PLACE", "mat": "I-PLACE"}


def t5(size=tokenized.SIZE):
    torch.manual_seed(6)
    config = T5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def bart(size=tokenized.SIZE):
    torch.manual_seed(7)
    config = BartConfig(
        vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, init_std=0.5,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.generation_config.update(num_beams=3, min_length=5, max_length=7, length_penalty=2.0, forced_eos_token_id=2)
    return model


def tagger(size=tokenized.SIZE):
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    return BertForTokenClassification(config)


def texts_for_texts(count=60):
    words = ["cat", "dog", "sky", "mat", "red"]
    pairs = [(words[i % 5], words[i % 3]) for i in range(count)]
    return [
        {"input": f"the {one} is {two} {'abcdefgh'[i % 8]}", "target": f"{one} {two}", "id": i}
        for i, (one, two) in enumerate(pairs)
    ]


def tagged(count=60):
    words = ["cat", "dog", "sky mat", "red", "blue"]
    texts = [f"the {words[i % 5]} is {words[i % 3]} {'abcdefgh'[i % 8]}".split() for i in range(count)]
    return [{"tokens": each, "tags": [TAGS.get(word, "O") for word in each], "id": i} for i, each in enumerate(texts)]


def lay(folder: Path) -> None:
    """Write a model of each head and rows for it into ``folder``, unlike in length, as :func:`recipes` read them."""
    for name, model in (("t5", t5()), ("tagger", tagger())):
        model.save_pretrained(folder / name)
        tokenized.tokenizer().save_pretrained(folder / name)
    images.vit().save_pretrained(folder / "vit")
    images.processor().save_pretrained(folder / "vit")
    images.lay(folder / "photos")
    texts = [{**row, "target": row["target"] + " no" * (row["id"] % 4)} for row in texts_for_texts()]
    tokenized.write_jsonl(folder / "texts.jsonl", texts)
    tokenized.write_jsonl(folder / "tagged.jsonl", tagged())


def recipes(folder: Path | str, test_size: int) -> dict[str, list[str]]:
    """What makes a recipe train each of them, without dropout."""
    data = f"test_size: {test_size}, columns: {{id: id}}"
    return {
        "seq2seq": [
            f"task={{kind: seq2seq, max_new_tokens: 6, data: {{train: {folder}/texts.jsonl, {data}}}}}",
            f"model={folder}/t5",
        ],
        "token_classification": [
            f"task={{kind: token_classification, data: {{train: {folder}/tagged.jsonl, {data}}}}}",
            f"model={folder}/tagger", UNDROPPED,
        ],
        "image_classification": [
            f"task={{kind: image_classification, data: {{train: {folder}/photos, test_size: {test_size}}}}}",
            f"model={folder}/vit",
        ],
    }  # fmt: skip
