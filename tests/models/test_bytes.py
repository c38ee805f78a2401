"""The byte-level transformer: made on the spot, the same every time, and a model like any other."""

import pytest
import torch

from helpers import tokenized, training
from scalora.models import bytes as byte_level
from scalora.models.load import load_model
from scalora.runs.recipe import parse_recipe
from scalora.runs.training import train
from scalora.tasks import build_task
from scalora.tasks.text import TextSpec

TEXTS = ["the cat sat on the mat", "a dog sat on the cat", "who sat on the red dog"] * 5
TINY = {"layers": 2, "width": 32, "steps": 80, "length": 32}


def test_every_byte_is_a_token_and_is_read_back():
    tokenizer = byte_level.byte_tokenizer()
    text = "".join(map(chr, range(1, 0x180))) + "→😀\r\n  end "
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert len(set(ids)) > 190
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 258
    assert not set(ids) & {tokenizer.pad_token_id, tokenizer.eos_token_id}


def test_it_learns_and_is_the_same_every_time():
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    one, other = byte_level.pretrained(TEXTS, **TINY), byte_level.pretrained(TEXTS, **TINY)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    ids = torch.tensor([byte_level.byte_tokenizer()(TEXTS[0])["input_ids"]])
    assert one(ids, labels=ids).loss < 3 < byte_level.pretrained(TEXTS, **{**TINY, "steps": 1})(ids, labels=ids).loss


def test_recipes_train_it_on_pairs_and_on_documents(tmp_path):
    byte_level.pretrained(TEXTS, **TINY).save_pretrained(tmp_path / "tiny")
    byte_level.byte_tokenizer().save_pretrained(tmp_path / "tiny")
    documents = tokenized.write_jsonl(tmp_path / "d.jsonl", [{"text": f"def f{i}(x): return x"} for i in range(20)])
    text = {"kind": "text", "data": {"train": documents, "test_size": 5, "validation_size": 5}, "max_length": 32}
    for task in ({"kind": "recall", "pairs": 8, "key_length": 2, "value_length": 2}, text):
        content = {
            "model": str(tmp_path / "tiny"), "precision": "float32", "task": task,
            "method": {"name": "scalora-i", "rank": 4, "options": {"interval": 5}},
            "training": {"max_steps": 20, "learning_rate": 2e-2, "per_device_train_batch_size": 8},
            "output": str(tmp_path / task["kind"]),
        }  # fmt: skip
        result = train(parse_recipe(content), baseline=True)
        assert result.before is not None
        assert result.after.metrics["nll"] < result.before.metrics["nll"] - 0.5
        assert result.metrics["primary"] == "nll"
        model = training.run_lines(result.loading)
        assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"


@pytest.mark.real
def test_the_real_one_has_read_english():
    """Minutes where it is not in the cache yet."""
    model, tokenizer = load_model("byte-lm", head="causal-lm")
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    data = {"train": "wikipedia", "test_size": 20}
    assert build_task(TextSpec(data=data, max_length=128)).score(model, tokenizer).metrics["nats_per_byte"] < 2.2
