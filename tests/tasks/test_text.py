import math
from itertools import pairwise

import pytest
import torch

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.models.bytes import byte_tokenizer
from scalora.tasks import build_task
from scalora.tasks.text import TextSpec

ROWS = [{"text": text} for text in ("the cat sat on the mat", "sky is blue", "who ran on the red mat", "no")]


def task(tmp_path, rows=ROWS, **fields):
    path = tokenized.write_jsonl(tmp_path / "documents.jsonl", rows)
    return build_task(TextSpec(data={"train": path, "test": path}, **fields))


@pytest.mark.parametrize("max_length", [2, 5, 7, 50])
def test_every_token_is_learnt_once_after_one_of_the_stream(tmp_path, max_length):
    tokenizer = tokenized.tokenizer()
    blocks = list(task(tmp_path, max_length=max_length).train_dataset(tokenizer, "test"))
    stream = " <eos> ".join(row["text"] for row in ROWS) + " <eos>"
    learnt = [token for block in blocks for token in block["labels"] if token != -100]
    assert tokenizer.decode(learnt) == stream
    assert blocks[0]["input_ids"][0] == tokenizer.eos_token_id
    for before, block in pairwise(blocks):
        assert len(before["input_ids"]) == max_length
        assert block["input_ids"][0] == before["input_ids"][-1]
        assert block["labels"] == [-100, *block["input_ids"][1:]]


@pytest.mark.parametrize("make", [tokenized.llama, tokenized.gpt2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_of_all_tokens_and_of_all_bytes(tmp_path, make, batch_size):
    model, tokenizer = make().eval(), tokenized.tokenizer()
    built = task(tmp_path, max_length=6)
    score = built.score(model, tokenizer, batch_size=batch_size)
    losses = []
    for block in built.train_dataset(tokenizer, "test"):
        with torch.no_grad():
            logits = model(torch.tensor([block["input_ids"]])).logits[0, :-1].log_softmax(-1)
        losses += [-logits[i, token].item() for i, token in enumerate(block["input_ids"][1:])]
    assert score.metrics["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    size = sum(len(row["text"].encode()) for row in ROWS)
    assert score.metrics["nats_per_byte"] == pytest.approx(sum(losses) / size, rel=1e-4)
    first = len(ROWS[0]["text"].split()) + 1
    assert score.predictions[0].probability == pytest.approx(math.exp(-sum(losses[:first]) / first), rel=1e-4)
    assert [p.text for p in score.predictions] == [row["text"] for row in ROWS]
    assert not score.higher_is_better


def test_a_byte_is_a_token_of_the_byte_tokenizer(tmp_path):
    tokenizer = byte_tokenizer()
    text = "Zoë\t→\r\n x"
    ids = task(tmp_path, rows=[{"text": text}]).train_dataset(tokenizer, "test")[0]["input_ids"]
    assert len(ids) == len(text.encode()) + 2
    assert tokenizer.decode(ids) == f"<eos>{text}<eos>"


def test_mistakes(tmp_path):
    with pytest.raises(ScaloraError, match=r"no column 'body' in .*; it has text"):
        _ = task(tmp_path, text="body").splits
    with pytest.raises(ScaloraError, match=r"task\.text: column 'text' is empty in .*, row 2"):
        _ = task(tmp_path, rows=[{"text": "the cat"}, {"text": " "}]).splits
    tokenizer = tokenized.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ScaloraError, match="no eos token to end a document"):
        task(tmp_path).train_dataset(tokenizer)
