import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.tasks import TaskSpec, build_task
from scalora.tasks.multiple_choice import MultipleChoiceSpec

ROWS = [
    {"question": "the cat sat on the mat", "choices": ["cat", "dog"], "answer": 0},
    {"question": "sky", "choices": ["the sky is blue", "red", "a b c"], "answer": 2},
    {"question": "who ran on the red mat why no yes", "choices": ["a", "b", "c", "d"], "answer": "c"},
    {"question": "what is blue", "choices": ["the cat", "dog"], "answer": 1},
    {"question": "a b c d e f g h a b c d", "choices": ["e", "f"], "answer": "1"},
]


def task(tmp_path, rows=ROWS, **fields):
    path = tokenized.write_jsonl(tmp_path / "rows.jsonl", rows)
    fields = {"prompt": "what {question} is ", **fields}
    return build_task(MultipleChoiceSpec(data={"train": path, "test": path}, **fields))


def naive(model, prompt, following):
    """Log-likelihoods of the tokens of `following`, one sequence at a time, without padding."""
    ids = prompt + following
    with torch.no_grad():
        logprobs = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logprobs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]


@pytest.mark.parametrize("make", [tokenized.llama, tokenized.gpt2])
@pytest.mark.parametrize("normalize", ["none", "length", "choice-tokens"])
def test_score_equals_a_naive_loop(tmp_path, make, normalize):
    model, tokenizer = make(), tokenized.tokenizer()
    score = task(tmp_path, normalize=normalize).score(model, tokenizer, batch_size=3)
    nll, right, hits = 0.0, [], 0
    for row, answer, prediction in zip(ROWS, [0, 2, 2, 1, 1], score.predictions, strict=True):
        prompt = tokenizer(f"what {row['question']} is")["input_ids"]
        found = [naive(model, prompt, tokenizer(choice)["input_ids"]) for choice in row["choices"]]
        divisors = [
            {"none": 1, "length": len(c), "choice-tokens": len(f)}[normalize]
            for c, f in zip(row["choices"], found, strict=True)
        ]
        values = torch.tensor([sum(f) / d for f, d in zip(found, divisors, strict=True)], dtype=torch.float64)
        among = values.log_softmax(0)
        nll -= among[answer].item() / len(ROWS)
        right += found[answer]
        hits += int(values.argmax()) == answer
        assert prediction.predicted == row["choices"][int(values.argmax())]
        assert prediction.expected == row["choices"][answer]
        assert prediction.probability == pytest.approx(among.max().exp().item(), rel=1e-4)
    assert score.metrics["accuracy"] == hits / len(ROWS)
    assert score.metrics["nll"] == pytest.approx(nll, rel=1e-4)
    assert score.metrics["answer_nll"] == pytest.approx(-sum(right) / len(right), rel=1e-4)
    assert (score.primary, score.higher_is_better, score.truncated) == ("accuracy", True, 0)


@pytest.mark.parametrize("make", [tokenized.llama, tokenized.gpt2])
def test_batch_size_does_not_matter(tmp_path, make):
    model, tokenizer = make(), tokenized.tokenizer()
    scores = [task(tmp_path).score(model, tokenizer, batch_size=size) for size in (1, 2, 32)]
    for score in scores[1:]:
        assert score.metrics == pytest.approx(scores[0].metrics, rel=1e-4)
        assert [p.predicted for p in score.predictions] == [p.predicted for p in scores[0].predictions]


def test_choices_of_one_token_need_one_sequence(tmp_path):
    rows = [{"question": q, "answer": 0} for q in ("the cat", "sky is blue", "dog")]
    fixed = task(tmp_path, rows, choices=[" yes", " no", " why"])
    model, tokenizer = tokenized.llama(), tokenized.tokenizer()
    shapes = []
    model.register_forward_hook(lambda _m, _a, output: shapes.append(tuple(output.logits.shape)))
    seen = []
    fast = fixed.score(model, tokenizer, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert shapes[-2:] == [(2, 1, tokenized.SIZE), (1, 1, tokenized.SIZE)]
    assert all(rows <= 2 for rows, *_ in shapes[:-2])  # a few short rows tell whether any may share a batch
    assert seen == [(2, 3), (3, 3)]
    # The same rows by way of a longer choice, which every short one is scored beside.
    slow = task(tmp_path, [{**r, "choices": [" yes", " no", " why", " a b"]} for r in rows]).score(model, tokenizer)
    assert slow.metrics["answer_nll"] == pytest.approx(fast.metrics["answer_nll"], rel=1e-4)


def test_mode_and_weights_are_left_alone(tmp_path):
    model = tokenized.llama().train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    task(tmp_path).score(model, tokenized.tokenizer(), autocast=torch.bfloat16)
    assert model.training
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    model.eval()
    task(tmp_path).score(model, tokenized.tokenizer())
    assert not model.training


def test_peft_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = task(tmp_path).score(tokenized.gpt2(), tokenized.tokenizer())
    adapted = get_peft_model(tokenized.gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert task(tmp_path).score(adapted, tokenized.tokenizer()).metrics == pytest.approx(plain.metrics, rel=1e-5)


def test_training_examples(tmp_path):
    tokenizer = tokenized.tokenizer()
    dataset = task(tmp_path).train_dataset(tokenizer, "test")
    example = dataset[1]
    assert tokenizer.decode(example["input_ids"]) == "what sky is a b c"
    assert example["labels"] == [-100] * 3 + example["input_ids"][3:]
    batch = task(tmp_path).collator(tokenizer)([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == (2, 9)
    assert batch["attention_mask"].tolist() == [[1] * 9, [1] * 6 + [0] * 3]
    assert batch["labels"][1].tolist() == [*example["labels"], -100, -100, -100]
    assert batch["input_ids"][1, 6:].tolist() == [tokenizer.pad_token_id] * 3


def test_training_loss_is_answer_nll(tmp_path):
    model, tokenizer = tokenized.llama(), tokenized.tokenizer()
    built = task(tmp_path)
    loss = model(**built.collator(tokenizer)(list(built.train_dataset(tokenizer, "test")))).loss
    assert loss.item() == pytest.approx(built.score(model, tokenizer).metrics["answer_nll"], rel=1e-4)


def test_long_prompts_lose_their_start(tmp_path):
    tokenizer = tokenized.tokenizer()
    short = task(tmp_path, max_length=5)
    dataset = short.train_dataset(tokenizer, "test")
    assert dataset.truncated == 5
    assert tokenizer.decode(dataset[1]["input_ids"]) == "sky is a b c"
    assert tokenizer.decode(dataset[4]["input_ids"]) == "b c d is f"
    assert all(len(example["input_ids"]) <= 5 and example["labels"][-1] != -100 for example in dataset)
    # Each sequence counts: all 13 but the second row's "red", whose four tokens fit.
    assert short.score(tokenized.llama(), tokenizer).truncated == 12
    with pytest.raises(ScaloraError, match=r"1 of 1 test rows need more tokens than task\.max_length, 3 .*, needs 5\)"):
        task(tmp_path, [ROWS[1]], max_length=3).train_dataset(tokenizer, "test")


def test_trailing_space_belongs_to_the_choice(tmp_path):
    tokenizer = tokenized.tokenizer()
    spaced = task(tmp_path).train_dataset(tokenizer, "test")
    rows = [{**row, "choices": [f" {choice}" for choice in row["choices"]]} for row in ROWS]
    assert (
        task(tmp_path, rows, prompt="what {question} is").train_dataset(tokenizer, "test").examples == spaced.examples
    )
    message = r"the text '.*' after the prompt 'what .* is' in .* is not kept by the tokenizer, which makes .*<unk>"
    with pytest.raises(ScaloraError, match=message):
        task(tmp_path, prompt="what {question} is").train_dataset(tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "{quest}"}, r"task\.data\.columns: no column 'quest' in .* — did you mean 'question'\?"),
        ({"prompt": "{question"}, r"task\.prompt: '\{question' is no template"),
        ({"prompt": "{}"}, r"task\.prompt: \{\} is no column"),
        ({"prompt": "{question.x}"}, r"task\.prompt: \{question\.x\} is no column"),
        ({"answer": "ans"}, "no column 'ans'"),
        (
            {"choices": ["a", " a"], "rows": [{**ROWS[0], "answer": "a"}]},
            "'a' in column 'answer' is more than one of the",
        ),
        (
            {"choices": [" yes", " no"], "rows": [{**ROWS[0], "answer": "Yes"}]},
            "nor one of the choices .* only in case from 'yes'",
        ),
        ({"answer": "question"}, "is neither an index from 0 to 1 nor one of the choices"),
        ({"choices": ["one"]}, r"task\.choices is \['one'\]: give two or more"),
        ({"choices": [" a", " a"]}, "give two or more different"),
    ],
)
def test_mistakes(tmp_path, fields, message):
    with pytest.raises(ScaloraError, match=message):
        task(tmp_path, **fields).train_dataset(tokenized.tokenizer())


@pytest.mark.parametrize("choices", ["cat or dog", ["cat"], ["cat", ""], [1, 2]])
def test_choices_that_are_none(tmp_path, choices):
    with pytest.raises(ScaloraError, match="the column choices must hold a list of two or more texts"):
        task(tmp_path, [{"question": "a", "choices": choices, "answer": 0}]).score(
            tokenized.llama(), tokenized.tokenizer()
        )


def test_no_validation_data(tmp_path):
    with pytest.raises(ScaloraError, match=r"task\.data\.validation: there is no validation data"):
        task(tmp_path).score(tokenized.llama(), tokenized.tokenizer(), "validation")


def test_metrics_that_are_not_finite(tmp_path):
    model = tokenized.llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ScaloraError, match="metric nll is nan"):
        task(tmp_path).score(model, tokenized.tokenizer())


def test_spec_is_discriminated_by_kind():
    spec = TypeAdapter(TaskSpec).validate_python({"kind": "multiple_choice", "data": {"train": "x"}, "prompt": "{q}"})
    assert isinstance(spec, MultipleChoiceSpec)
    with pytest.raises(ValidationError, match="promt"):
        MultipleChoiceSpec(data={"train": "x"}, prompt="{q}", promt="{q}")


@pytest.fixture(scope="module")
def real_tokenizer():
    from scalora.models.load import load_model

    return load_model("smollm2-135m-instruct", head="causal-lm")[1]


@pytest.mark.real
@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_real_tokens_agree_with_the_harness(real_tokenizer, end):
    harness = pytest.importorskip("lm_eval.api.model").TemplateLM
    from scalora.tasks.completion import encode

    tokenizer = real_tokenizer

    class Reference:
        backend = "causal"

        def tok_encode(self, text):
            return tokenizer.encode(text)

    texts = [("Question: why?\nAnswer:" + end, following) for following in (" no", " because it is", "yes")]
    assert encode(tokenizer, texts) == [harness._encode_pair(Reference(), *pair) for pair in texts]
