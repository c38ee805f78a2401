import json
from pathlib import Path

import pytest
import torch

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.common.files import digest, seal
from scalora.models.base_print import backbone_fingerprint
from scalora.models.load import load_model


@pytest.fixture
def saved(tmp_path):
    def save(model, tokenizer=None):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        (tokenizer or tokenized.tokenizer()).save_pretrained(folder)
        return str(folder)

    return save


def test_causal_lm_from_a_folder(saved):
    original = tokenized.llama()
    model, tokenizer = load_model(saved(original), head="causal-lm")
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<pad>")
    assert backbone_fingerprint(model) == backbone_fingerprint(original)


def test_dtype_and_fingerprint(saved):
    folder = saved(tokenized.llama())
    half, _ = load_model(folder, head="causal-lm", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert backbone_fingerprint(half) == backbone_fingerprint(tokenized.llama())
    with torch.no_grad():
        half.model.layers[1].mlp.up_proj.weight *= 1.1
    assert backbone_fingerprint(half) != backbone_fingerprint(tokenized.llama())
    assert backbone_fingerprint(tokenized.gpt2()) != backbone_fingerprint(tokenized.llama())


def test_fingerprint_ignores_a_random_head(saved):
    folder = saved(tokenized.llama())
    first, _ = load_model(folder, head="sequence-classification", num_labels=2)
    second, _ = load_model(folder, head="sequence-classification", num_labels=3)
    assert second.config.num_labels == 3
    assert not torch.equal(first.score.weight, second.score.weight[:2])
    assert backbone_fingerprint(first) == backbone_fingerprint(second)


def test_eos_stands_in_for_a_missing_pad_token(saved):
    tokenizer = tokenized.tokenizer()
    tokenizer.pad_token = None
    model, loaded = load_model(saved(tokenized.gpt2(), tokenizer), head="causal-lm")
    assert loaded.pad_token == "<eos>"
    assert model.config.pad_token_id == loaded.pad_token_id


def test_no_pad_and_no_eos(saved):
    tokenizer = tokenized.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ScaloraError, match="neither a pad nor an eos token"):
        load_model(saved(tokenized.gpt2(), tokenizer), head="causal-lm")


def test_bert_is_no_causal_lm(saved):
    folder = saved(tokenized.bert())
    with pytest.raises(ScaloraError, match="is a bert model and cannot be a causal-lm model"):
        load_model(folder, head="causal-lm")
    model, _ = load_model(folder, head="sequence-classification", num_labels=2)
    assert torch.equal(model.classifier.weight, tokenized.bert().classifier.weight)


def test_a_checkpoint_without_its_lm_head(saved):
    with pytest.raises(ScaloraError, match=r"has no lm_head\.weight"):
        load_model(saved(tokenized.llama().model), head="causal-lm")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smollm2-135m-instrct", "did you mean 'smollm2-135m-instruct'"),
        ("sarcasm", "is a packaged data set, not a model"),
        ("./no/such/folder", "there is no file or folder"),
        ("models/some.gguf", "there is no file or folder"),
        ("nobody/nothing-at-all", "cannot load 'nobody/nothing-at-all'"),
    ],
)
def test_sources_that_are_not_there(source, message):
    with pytest.raises(ScaloraError, match=message):
        load_model(source, head="causal-lm")


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
@pytest.mark.parametrize("made", [tokenized.llama, tokenized.bert])
def test_a_folder_without_a_tokenizer(saved, made, kept):
    """transformers makes a BERT tokenizer of five special tokens of no file at all."""
    folder = Path(saved(made()))
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors", *kept):
            file.unlink()
    options = {"head": "causal-lm"} if made is tokenized.llama else {"head": "sequence-classification", "num_labels": 2}
    with pytest.raises(ScaloraError, match=r"has no tokenizer: none of tokenizer\.json, vocab\.json, .* is there"):
        load_model(str(folder), **options)
    assert load_model(str(folder), **options, need_tokenizer=False)[1] is None


def test_a_damaged_tokenizer_is_not_called_absent(saved):
    folder = Path(saved(tokenized.llama()))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ScaloraError, match="its files are damaged"):
        load_model(str(folder), head="causal-lm")


def test_folders_and_files_of_the_wrong_kind(tmp_path):
    with pytest.raises(ScaloraError, match=r"no config\.json"):
        load_model(str(tmp_path), head="causal-lm")
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    with pytest.raises(ScaloraError, match=r"no \.gguf"):
        load_model(str(file), head="causal-lm")


def test_a_broken_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALORA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(ScaloraError, match="cannot load"):
        load_model(str(file), head="causal-lm")
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_a_cut_conversion_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALORA_CACHE", str(tmp_path))
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    place = tmp_path / "converted" / digest(file)[:16]
    tokenized.llama().save_pretrained(place)
    tokenized.tokenizer().save_pretrained(place)
    seal(place)
    load_model(str(file), head="causal-lm")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ScaloraError, match=r"some\.gguf, is damaged \(model\.safetensors has .* bytes.*delete"):
        load_model(str(file), head="causal-lm")


def test_a_cut_model_is_one_message(tmp_path):
    tokenized.llama().save_pretrained(tmp_path)
    tokenized.tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ScaloraError, match="cannot load"):
        load_model(str(tmp_path), head="causal-lm")


def test_arguments():
    with pytest.raises(ScaloraError, match=r"^dtype is 'int8'"):
        load_model("x", head="causal-lm", dtype="int8")
    with pytest.raises(ScaloraError, match="num_labels is None"):
        load_model("x", head="sequence-classification")


@pytest.mark.real
def test_real_gguf_trains_and_saves(tmp_path):
    model, tokenizer = load_model("smollm2-135m-instruct", head="causal-lm")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("GatedRepoError", "who accepted its terms: do so on its page, log in"),
        ("RepositoryNotFoundError", "the hub has no model of that name, or a private one"),
        ("HfHubHTTPError", "the hub could not be asked"),
        ("LocalEntryNotFoundError", "the hub could not be asked"),
        ("OfflineModeIsEnabled", "the hub could not be asked"),
    ],
)
def test_what_the_hub_does_is_the_hubs(monkeypatch, failure, words):
    """Such errors arrive wrapped in an OSError, as if the disk were full."""
    import huggingface_hub.errors
    from transformers import AutoConfig

    def fail(*_args, **_options):
        cause = getattr(huggingface_hub.errors, failure)
        raise OSError("some words of transformers") from cause.__new__(cause)

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(ScaloraError, match=f"cannot load 'somebody/something'.*{words}"):
        load_model("somebody/something", head="causal-lm")


def test_what_a_folder_does_is_not_the_hubs(saved):
    folder = saved(tokenized.llama())
    (Path(folder) / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ScaloraError, match="its files are damaged") as caught:
        load_model(folder, head="causal-lm")
    assert "network" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": {"hidden_size": 48}}, r"^config: .* of '.*' has the shape \(.*\), and \(.*48.*\) is asked for"),
        ({"config": {"hidden_size": "x"}}, r"^config: .* cannot be loaded with \{'hidden_size': 'x'\} .*leave these"),
        ({"attn_implementation": "flash"}, "^attn_implementation is 'flash': .*choose eager or sdpa"),
        ({"dtype": "foo"}, "^dtype is 'foo'"),
    ],
)
def test_a_value_of_the_recipe_that_does_not_go_is_named_and_the_files_are_not_called_damaged(saved, options, words):
    with pytest.raises(ScaloraError, match=words):
        load_model(saved(tokenized.llama()), head="causal-lm", **options)


def test_files_that_do_not_go_with_one_another_are_said_to(saved):
    folder = Path(saved(tokenized.llama()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(ScaloraError, match=r"^model: .* by its config\.json"):
        load_model(str(folder), head="causal-lm")
