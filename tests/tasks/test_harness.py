"""lm-evaluation-harness and our own scoring agree on the same rows; and what it refuses is said plainly."""

import pytest
import torch

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.tasks import build_task
from scalora.tasks.multiple_choice import MultipleChoiceSpec

pytest.importorskip("lm_eval")

ROWS = [
    {"question": "the cat sat on the mat", "choices": ["cat", "dog"], "answer": 0},
    {"question": "sky", "choices": ["the sky is blue", "red", "a b c"], "answer": 2},
    {"question": "who ran on the red mat why no yes", "choices": ["a", "b", "c", "d"], "answer": 2},
    {"question": "what is blue", "choices": ["the cat", "dog"], "answer": 1},
]


def task(tmp_path, **fields):
    path = tokenized.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    fields = {"prompt": "what {question} is ", **fields}
    return build_task(MultipleChoiceSpec(data={"train": path, "test": path}, **fields))


@pytest.mark.parametrize("normalize", ["none", "length"])
@pytest.mark.parametrize("extra", [{}, {"prompt": "what {choice} is", "continuation": " {question}"}])
def test_the_harness_scores_as_we_do(tmp_path, normalize, extra):
    model, tokenizer = tokenized.llama().train(), tokenized.tokenizer()
    for seed in range(3):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        ours = task(tmp_path, normalize=normalize, **extra).score(model, tokenizer)
        theirs = task(tmp_path, normalize=normalize, harness="rows", **extra).score(model, tokenizer)
        assert theirs.metrics["accuracy"] == ours.metrics["accuracy"]
        assert theirs.metrics["nll"] == pytest.approx(ours.metrics["nll"], rel=1e-4)
        assert [p.predicted for p in theirs.predictions] == [p.predicted for p in ours.predictions]
        assert {"acc", "acc_norm"} <= set(theirs.metrics)
        assert model.training


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"harness": "no_such_task_here"}, "'no_such_task_here' could not be evaluated"),
        ({"harness": "rows", "normalize": "choice-tokens"}, "task.normalize"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, fields, words):
    with pytest.raises(ScaloraError, match=words):
        task(tmp_path, **fields).score(tokenized.llama(), tokenized.tokenizer())


def test_what_it_would_lose_is_refused(tmp_path):
    rows = [{"question": "12", "choices": ["3 apples", "7"], "answer": 0}] * 2
    path = tokenized.write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = tokenized.byte_level()
    spec = MultipleChoiceSpec(data={"train": path, "test": path}, prompt="Question: {question}", harness="rows")
    with pytest.raises(ScaloraError, match="lm-evaluation-harness loses a part of '3 apples' after 'Question: 12'"):
        build_task(spec).score(models_of(tokenizer), tokenizer)


def models_of(tokenizer):
    """A tiny model of a tokenizer's size."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64))
