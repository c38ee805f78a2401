"""Texts longer than a model's table of positions are refused before anything is trained."""

import pytest
import torch
import transformers

from helpers import tokenized, workspace
from scalora import ScaloraError
from scalora.runs.loading import load_inputs
from scalora.runs.recipe import load_recipe
from scalora.tasks.positions import positions

ROOM = 64
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": ROOM}
MODELS = {
    "Bert": {**SIZES, "max_position_embeddings": ROOM},
    "Roberta": {**SIZES, "max_position_embeddings": ROOM + 2},
    "DistilBert": {"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 4, "max_position_embeddings": ROOM},
    "OPT": {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": ROOM},
    "GPT2": GPT,
    "GPTJ": {**GPT, "rotary_dim": 8},
    "CodeGen": {**GPT, "rotary_dim": 4},
    "Llama": {**SIZES, "max_position_embeddings": ROOM},
    "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_room_is_what_the_model_can_read(name):
    config = getattr(transformers, f"{name}Config")(vocab_size=50, bos_token_id=1, eos_token_id=2, **MODELS[name])
    model = getattr(transformers, f"{name}Model")(config).eval()
    room = positions(model)
    assert room == (None if name in ("Llama", "Bloom") else ROOM)
    model(input_ids=torch.full((1, room or 2 * ROOM), 7))
    if room is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, room + 1), 7))


@pytest.fixture
def laid(tmp_path):
    """A recipe, and a GPT-2 and data with one text that is longer than its table."""
    path = workspace.lay(tmp_path)
    model = tokenized.gpt2()
    assert model.config.n_positions < 500
    model.save_pretrained(tmp_path / "gpt2")
    tokenized.tokenizer().save_pretrained(tmp_path / "gpt2")
    rows = [{"text": f"the cat {'cat ' * (600 if i == 20 else i)}", "label": i % 2, "word": "cat"} for i in range(21)]
    tokenized.write_jsonl(tmp_path / "long.jsonl", rows)
    tokenized.write_jsonl(tmp_path / "short.jsonl", rows[:20])
    return path, tmp_path, model.config.n_positions


KINDS = {
    "classification": "text: text, label: label",
    "multiple_choice": "prompt: '{text}', choices: [' cat', ' dog'], answer: label",
    "completion": "prompt: '{text}', completion: ' {word}'",
    "text": "text: text",
}


def _load(laid, kind, fields="", train="long"):
    path, folder, _ = laid
    data = f", data: {{train: {folder / train}.jsonl, test: {folder / 'short.jsonl'}}}"
    task = f"task={{kind: {kind}, {KINDS[kind]}{data}{fields}}}"
    return load_inputs(load_recipe(path, [f"model={folder / 'gpt2'}", task]))


@pytest.mark.parametrize("kind", KINDS)
def test_longer_texts_are_refused_by_name(laid, kind):
    room = laid[2]
    with pytest.raises(
        ScaloraError, match=rf"^task\.max_length is 512, but GPT2.* has {room} positions.* to {room} or"
    ):
        _load(laid, kind)
    assert _load(laid, kind, f", max_length: {room}").dataset.longest <= room
    if kind != "text":  # whose blocks are of all documents
        assert _load(laid, kind, train="short").dataset.longest <= room


def test_what_would_be_written_is_refused_by_name(laid):
    room = laid[2]
    with pytest.raises(ScaloraError, match=rf"^task\.max_new_tokens is {room}, but GPT2.* has {room} positions"):
        _load(laid, "completion", f", answer: '(cat)', max_new_tokens: {room}", train="short")
    _load(laid, "completion", ", answer: '(cat)', max_new_tokens: 8", train="short")


def test_tokens_without_an_embedding(tmp_path):
    path = workspace.lay(tmp_path)
    tokenizer = tokenized.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<fill>"})
    tokenizer.save_pretrained(tmp_path / "llama")
    rows = [{"text": "the cat sat on".rsplit(" ", i % 3)[0], "label": i % 2, "id": i} for i in range(60)]
    tokenized.write_jsonl(tmp_path / "data.jsonl", rows)
    loaded = load_inputs(load_recipe(path))  # padding is read by nothing: eos does
    assert (loaded.tokenizer.pad_token, loaded.model.config.pad_token_id) == ("<eos>", tokenizer.eos_token_id)
    tokenizer.add_tokens(["moon"])
    tokenizer.save_pretrained(tmp_path / "llama")
    tokenized.write_jsonl(tmp_path / "data.jsonl", [*rows, {"text": "the moon", "label": 0, "id": 60}])
    with pytest.raises(ScaloraError, match=r"embeddings for 28 tokens, but the \w+ rows have the token 'moon'"):
        load_inputs(load_recipe(path))
