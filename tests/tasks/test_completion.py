import math
import re

import pytest
import torch

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.tasks import build_task
from scalora.tasks.completion import CompletionSpec
from scalora.tasks.generation import extract
from scalora.tasks.scoring import batches

ROWS = [
    {"q": "the cat", "a": "sat on the mat"},
    {"q": "sky is", "a": "blue"},
    {"q": "who ran on the red mat", "a": "the dog"},
]


def task(tmp_path, rows=ROWS, **fields):
    path = tokenized.write_jsonl(tmp_path / "rows.jsonl", rows)
    fields = {"prompt": "{q}", "completion": " {a}", **fields}
    return build_task(CompletionSpec(data={"train": path, "test": path}, **fields))


def test_training_examples_end_with_eos(tmp_path):
    tokenizer = tokenized.tokenizer()
    example = task(tmp_path).train_dataset(tokenizer, "test")[1]
    assert tokenizer.decode(example["input_ids"]) == "sky is blue <eos>"
    assert example["labels"] == [-100, -100, *example["input_ids"][2:]]


@pytest.mark.parametrize("make", [tokenized.llama, tokenized.gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_score_is_weighted_by_tokens(tmp_path, make, batch_size):
    model, tokenizer = make().eval(), tokenized.tokenizer()
    built = task(tmp_path)
    score = built.score(model, tokenizer, batch_size=batch_size)
    total, count = 0.0, 0
    for example, prediction in zip(built.train_dataset(tokenizer, "test"), score.predictions, strict=True):
        tokens = sum(label != -100 for label in example["labels"])
        with torch.no_grad():
            inputs = {name: torch.tensor([value]) for name, value in example.items()}
            loss = model(**inputs).loss.item()
        assert prediction.probability == pytest.approx(math.exp(-loss), rel=1e-4)
        assert prediction.predicted is None
        total, count = total + loss * tokens, count + tokens
    assert score.metrics == {"nll": pytest.approx(total / count, rel=1e-4)}
    assert not score.higher_is_better


def test_empty_prompt_starts_from_bos(tmp_path):
    tokenizer = tokenized.tokenizer()
    example = task(tmp_path, prompt="").train_dataset(tokenizer, "test")[1]
    assert tokenizer.decode(example["input_ids"]) == "<bos> blue <eos>"


def test_truncated_prompts_keep_the_completion(tmp_path):
    tokenizer = tokenized.tokenizer()
    dataset = task(tmp_path, max_length=6).train_dataset(tokenizer, "test")
    assert dataset.truncated == 2
    assert tokenizer.decode(dataset[0]["input_ids"]) == "cat sat on the mat <eos>"
    assert tokenizer.decode(dataset[2]["input_ids"]) == "the red mat the dog <eos>"


def test_mistakes(tmp_path):
    tokenizer = tokenized.tokenizer()
    with pytest.raises(ScaloraError, match=r"task\.data\.columns: no column 'b'"):
        task(tmp_path, completion="{b}").train_dataset(tokenizer, "test")
    with pytest.raises(ScaloraError, match=r"task\.completion: '\{a' is no template"):
        task(tmp_path, completion="{a")
    with pytest.raises(ScaloraError, match=r"column 'a' is empty in .*, line 1, row 1"):
        task(tmp_path, [{"q": "a", "a": ""}]).train_dataset(tokenizer, "test")
    with pytest.raises(ScaloraError, match=r"3 of 3 test rows need more tokens than task\.max_length, 2 .*needs 6"):
        task(tmp_path, max_length=2).train_dataset(tokenizer, "test")
    tokenizer.eos_token = None
    with pytest.raises(ScaloraError, match="no eos token"):
        task(tmp_path).train_dataset(tokenizer, "test")
    tokenizer = tokenized.tokenizer()
    tokenizer.bos_token, eos = None, tokenizer.eos_token_id
    assert task(tmp_path, prompt="").train_dataset(tokenizer, "test")[0]["input_ids"][0] == eos


def test_batches_cover_all_once_and_bound_the_logits():
    lengths, kept = [3, 9, 5, 7, 1], [1, 2000, 1, 1, 1]
    found = list(batches(lengths, kept, 2))
    assert found == [[1], [3, 2], [0, 4]]
    assert list(batches([], [], 2)) == []


def test_a_lean_batch_gives_the_same_loss_and_gradients():
    from helpers import models
    from scalora.tasks.task import Collator

    rows = [
        {"input_ids": list(range(2, 2 + n)), "labels": [-100] * (n - k) + list(range(3, 3 + k))}
        for n, k in ((9, 2), (5, 1), (7, 3))
    ]
    results = []
    for lean in (False, True):
        model = models.lora("llama")
        batch = Collator(0, lean)(rows)
        assert ("logits_to_keep" in batch) == lean
        output = model(**batch)
        output.loss.backward()
        results.append((output.loss, [p.grad for p in models.trainable(model)]))
    assert output.logits.shape[1] < batch["input_ids"].shape[1]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("make", [tokenized.llama, tokenized.gpt2])
def test_exact_match_is_of_what_the_model_writes_by_itself(tmp_path, make, batch_size):
    model, tokenizer = make().eval(), tokenized.tokenizer()
    written = []
    for row in ROWS:  # one at a time and without padding or cache: the twin
        ids = tokenizer(row["q"])["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 3 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        written.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    rows = [{"q": row["q"], "a": text or "the"} for row, text in zip(ROWS, written, strict=True)]
    rows[0]["a"] = "mat dog cat sky"  # a wrong one
    built = task(tmp_path, rows=rows, answer=r"(\S+)\s*$", max_new_tokens=3)
    score = built.score(model, tokenizer, batch_size=batch_size)
    assert [p.predicted for p in score.predictions] == written
    right = [bool(text) and text.split()[-1] == row["a"].split()[-1] for text, row in zip(written, rows, strict=True)]
    assert score.metrics["exact_match"] == sum(right) / 3
    assert score.primary == "exact_match"
    assert score.higher_is_better


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 5 + 3 = <<5+3=8>>8\n#### 8", "8"),
        ("#### 1,234", "1234"),
        ("The answer is: 12.", "12"),
        ("no number", None),
        ("#### 3 … #### 4", "4"),
    ],
)
def test_answers_are_found_in_texts(text, answer):
    assert extract(re.compile(r"(?:####|answer is:?)\s*([-\d.,]+)"), text) == answer


@pytest.mark.parametrize(("pattern", "words"), [("(", "no regular expression"), ("####", "finds nothing")])
def test_a_pattern_that_cannot_work_is_refused(tmp_path, pattern, words):
    with pytest.raises(ScaloraError, match=words):
        task(tmp_path, answer=pattern).score(tokenized.llama(), tokenized.tokenizer())
