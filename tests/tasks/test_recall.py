import math

import pytest
import torch
from pydantic import ValidationError

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.models.bytes import byte_tokenizer, pretrained
from scalora.tasks import build_task
from scalora.tasks.recall import RecallSpec


def task(**fields):
    return build_task(RecallSpec(**fields))


@pytest.fixture(scope="module")
def model():
    """One that has seen that digits follow an arrow, but no pair."""
    return pretrained([f"{i:x}->{i * i}" for i in range(300)], layers=1, width=32, steps=60, length=32)


def test_pairs_are_distinct_and_decided_by_the_seed():
    rows = task(pairs=90, alphabet="digits", key_length=2, value_length=5).splits.train
    assert len({row["key"] for row in rows}) == 90
    assert all(len(row["key"]) == 2 and len(row["value"]) == 5 for row in rows)
    assert all((row["key"] + row["value"]).isdecimal() for row in rows)
    assert len({row["value"] for row in rows}) > 85
    again = task(pairs=90, alphabet="digits", key_length=2, value_length=5)
    assert again.splits.train == rows
    assert task(pairs=90, alphabet="digits", key_length=2, value_length=5, seed=1).splits.train != rows


def test_all_are_trained_on_and_each_is_either_chosen_by_or_reported():
    splits = task(pairs=7).splits
    assert splits.validation + splits.test == splits.train
    assert [len(rows) for rows in splits] == [7, 3, 4]


def test_the_end_is_learnt_but_not_scored(model):
    tokenizer, built = byte_tokenizer(), task(pairs=6, prompt="<{key}> ")
    scored = built.score(model, tokenizer)
    losses = []
    for row, example in zip(built.splits.test, built.train_dataset(tokenizer, "test"), strict=True):
        assert tokenizer.decode(example["input_ids"]) == f"<{row['key']}> {row['value']}<eos>"
        learnt = [token for token in example["labels"] if token != -100]
        # The space at the prompt's end is read with the value, as everywhere.
        assert tokenizer.decode(learnt) == f" {row['value']}<eos>"
        ids = example["input_ids"][:-1]
        labels = example["labels"][:-1]
        with torch.no_grad():
            losses.append(model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item())
    assert scored.metrics["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert not scored.higher_is_better
    assert [p.probability for p in scored.predictions] == [pytest.approx(math.exp(-x), rel=1e-4) for x in losses]


def test_recall_is_exact_where_the_model_writes_the_value_by_itself(model):
    """The twin writes greedily, a token at a time. A value that the model would write is put in for every second."""
    tokenizer, built = byte_tokenizer(), task(pairs=8, value_length=5)
    for row in built.splits.test[::2]:
        ids = tokenizer(built.prompt(row))["input_ids"]
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        row["value"] = tokenizer.decode(ids[-5:])
    assert built.score(model, tokenizer).metrics["exact_recall"] == 0.5
    assert built.score(model, tokenizer, "validation").metrics["exact_recall"] == 0.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"pairs": 101, "alphabet": "digits", "key_length": 2},
            "pairs is 101, but there are only 100 keys of 2 digits",
        ),
        ({"data": {"train": "x.jsonl", "test_size": 1}}, "recall makes its own pairs: leave it out"),
        ({"pairs": 1}, "pairs"),
        ({"alphabet": "greek"}, "alphabet"),
        ({"value_length": 0}, "value_length"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, words):
    with pytest.raises(ValidationError, match=words):
        RecallSpec(**fields)


@pytest.mark.parametrize("prompt", ["key:", "{key}={value}", "{keys}->"])
def test_a_prompt_has_the_key_and_nothing_else(prompt):
    with pytest.raises(ScaloraError, match=r"task\.prompt is .* must have the field \{key\}"):
        task(prompt=prompt)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tokenized.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ScaloraError, match="no eos token to end a value"):
        task(pairs=4).train_dataset(tokenizer)
    with pytest.raises(ScaloraError, match=r"task\.max_length is .*, but an answer in pair 1 has"):
        task(pairs=4, max_length=8).train_dataset(byte_tokenizer())


def test_a_stored_recipe_is_read_again():
    spec = RecallSpec(pairs=9, seed=4)
    assert RecallSpec(**spec.model_dump(mode="json")) == spec
