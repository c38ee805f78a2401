import importlib

import pytest
import torch

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.tasks import build_task
from scalora.tasks.classification import ClassificationSpec

ROWS = [
    {"s": "the cat sat on the mat", "t": "dog", "label": "no"},
    {"s": "sky is blue", "t": "a b c d", "label": "yes"},
    {"s": "who", "t": "ran", "label": "yes"},
    {"s": "red", "t": "why not the dog on the mat", "label": "no"},
]


def task(tmp_path, rows=ROWS, test=None, **fields):
    train = tokenized.write_jsonl(tmp_path / "train.jsonl", rows)
    test = tokenized.write_jsonl(tmp_path / "test.jsonl", test or rows)
    return build_task(ClassificationSpec(data={"train": train, "test": test}, **{"text": "s", **fields}))


def numbered(*values):
    return [{**row, "label": value} for row, value in zip(ROWS, values, strict=True)]


def one_by_one(model, tokenizer, texts):
    with torch.no_grad():
        return torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in texts]).double()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_accuracy_and_nll(tmp_path, batch_size):
    model, tokenizer = tokenized.bert(), tokenized.tokenizer()
    built = task(tmp_path)
    score = built.score(model, tokenizer, batch_size=batch_size)
    logprobs = one_by_one(model, tokenizer, [row["s"] for row in ROWS]).log_softmax(-1)
    targets = torch.tensor([0, 1, 1, 0])
    assert built.labels == ["no", "yes"]
    assert built.num_labels == 2
    assert score.metrics["accuracy"] == (logprobs.argmax(-1) == targets).double().mean()
    assert score.metrics["nll"] == pytest.approx(-logprobs[range(4), targets].mean().item(), rel=1e-4)
    assert [p.expected for p in score.predictions] == ["no", "yes", "yes", "no"]
    assert score.predictions[0].probability == pytest.approx(logprobs[0].max().exp().item(), rel=1e-4)


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_other_metrics(tmp_path, metric):
    score = task(tmp_path, metric=metric).score(tokenized.bert(), tokenized.tokenizer())
    assert score.primary == metric
    metrics = importlib.import_module("sklearn.metrics")
    function = {"matthews": metrics.matthews_corrcoef, "f1": metrics.f1_score}[metric]
    predicted = [int(p.predicted == "yes") for p in score.predictions]
    assert score.metrics[metric] == pytest.approx(function([0, 1, 1, 0], predicted))


def test_regression(tmp_path):
    built = task(tmp_path, numbered("5.000", 1.5, "0", 3), regression=True)
    model, tokenizer = tokenized.bert(num_labels=1), tokenized.tokenizer()
    assert built.num_labels == 1
    score = built.score(model, tokenizer)
    found = one_by_one(model, tokenizer, [row["s"] for row in ROWS])[:, 0]
    targets = torch.tensor([5, 1.5, 0, 3], dtype=torch.float64)
    assert score.metrics["pearson"] == pytest.approx(
        torch.corrcoef(torch.stack([found, targets]))[0, 1].item(), rel=1e-4
    )
    assert score.metrics["mse"] == pytest.approx(((found - targets) ** 2).mean().item(), rel=1e-4)
    assert score.metrics["pearson_spearman"] == pytest.approx(
        (score.metrics["pearson"] + score.metrics["spearman"]) / 2
    )
    batch = built.collator(tokenizer)(list(built.train_dataset(tokenizer, "test")))
    assert batch["labels"].tolist() == [5, 1.5, 0, 3]
    assert model(**batch).loss.item() == pytest.approx(score.metrics["mse"], rel=1e-4)


def test_constant_predictions_are_an_error(tmp_path):
    model = tokenized.bert(num_labels=1)
    torch.nn.init.zeros_(model.classifier.weight)
    with (
        pytest.warns(Warning, match="constant"),
        pytest.raises(ScaloraError, match=r"pearson_spearman is nan.*do not vary"),
    ):
        task(tmp_path, numbered(1, 2, 3, 4), regression=True).score(model, tokenized.tokenizer())


def test_training_examples(tmp_path):
    tokenizer = tokenized.tokenizer()
    built = task(tmp_path, text="{s} is {t}")
    dataset = built.train_dataset(tokenizer, "test")
    assert tokenizer.decode(dataset[2]["input_ids"]) == "who is ran"
    batch = built.collator(tokenizer)(list(dataset))
    assert batch["labels"].tolist() == [0, 1, 1, 0]
    assert batch["attention_mask"].sum(-1).tolist() == [len(e["input_ids"]) for e in dataset]
    loss = tokenized.bert().eval()(**batch).loss.item()
    assert loss == pytest.approx(built.score(tokenized.bert(), tokenizer).metrics["nll"], rel=1e-4)


def test_pairs_carry_token_types(tmp_path):
    tokenizer = tokenized.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    built = task(tmp_path, text_pair="t")
    example = built.train_dataset(tokenizer, "test")[1]
    assert example["token_type_ids"] == [0, 0, 0, 1, 1, 1, 1]
    assert built.collator(tokenizer)(list(built.train_dataset(tokenizer, "test")))["token_type_ids"].shape == (4, 8)
    assert built.score(tokenized.bert(), tokenizer).predictions[1].text == "sky is blue | a b c d"


def test_decoder_with_a_classification_head(tmp_path):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tokenized.llama().config)
    scores = [task(tmp_path).score(model, tokenized.tokenizer(), batch_size=size) for size in (1, 4)]
    assert scores[0].metrics == pytest.approx(scores[1].metrics, rel=1e-4)


def test_truncation_is_counted(tmp_path):
    built = task(tmp_path, max_length=3)
    dataset = built.train_dataset(tokenized.tokenizer())
    assert dataset.truncated == 1
    assert max(len(example["input_ids"]) for example in dataset) == 3
    assert built.score(tokenized.bert(), tokenized.tokenizer()).truncated == 1


def test_labels_that_look_alike_are_classes_where_they_are_listed(tmp_path):
    rows = numbered("b", "B", "B", "b")
    built = task(tmp_path, rows, labels=["B", "b"])
    assert [each["labels"] for each in built.train_dataset(tokenized.tokenizer(), "test")] == [1, 0, 0, 1]


def test_label_order(tmp_path):
    assert task(tmp_path, labels=["yes", "no"]).train_dataset(tokenized.tokenizer(), "test")[0]["labels"] == 1
    assert task(tmp_path, numbered(2, 10, 9, 2)).labels == ["2", "9", "10"]
    assert (
        task(tmp_path, numbered(0, 1, 1, 0), labels=[0, 1]).train_dataset(tokenized.tokenizer(), "test")[1]["labels"]
        == 1
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "ss"}, "no column 'ss' in .* did you mean 's'"),
        ({"text_pair": "{u}"}, "no column 'u'"),
        ({"metric": "pearson_spearman"}, "with regression False: it must be accuracy, matthews or f1"),
        ({"metric": "f1", "regression": True}, "with regression True: it must be pearson_spearman"),
        ({"regression": True, "labels": [0, 1]}, "regression has no labels"),
        ({"regression": True}, r"'no' in .*train\.jsonl, line 1, row 1 is not a finite number"),
        ({"labels": ["yes", "maybe"]}, r"'no' in .*train\.jsonl, line 1, row 1 is not one of the labels"),
        ({"labels": ["Yes", "No"]}, "that task.labels lists; it differs only in case from 'No'; .* or list it too"),
        (
            {"test": [{**ROWS[0], "label": "YES"}]},
            "of the training rows, from which .*; it differs only in case from 'yes'; .* or list all",
        ),
        ({"rows": numbered("no", "yes", "Yes", "no")}, r"'yes' would be a class of its own .* only in case from 'Yes'"),
        ({"rows": numbered("so", "a b", "a  b", "so")}, r"would be a class of its own .* only in white space"),
        ({"rows": numbered("so", "a", "a\u200b", "so")}, r"would be a class of its own .* invisible characters"),
        ({"rows": numbered("so", "caf\u00e9", "cafe\u0301", "so")}, r"would be a class .* how accents are encoded"),
        ({"labels": ["yes"]}, "needs two or more different labels"),
        (
            {"label": "s", "text": "t", "test": [{**ROWS[0], "s": "unseen"}]},
            r"'unseen' in .*test\.jsonl, line 1, row 1 is not one of",
        ),
        ({"rows": numbered(0.5, 1.0, 2.5, 3.0)}, "numbers, not labels; set regression: true"),
        ({"rows": numbered("no", "no", "no", "no")}, "needs two or more different labels, found"),
        ({"rows": [*ROWS, {"s": "", "t": "", "label": "no"}]}, r"column 's' is empty in .*train\.jsonl, line 5"),
    ],
)
def test_mistakes(tmp_path, fields, message):
    def run():
        built = task(tmp_path, **fields)
        built.train_dataset(tokenized.tokenizer())
        built.score(tokenized.bert(), tokenized.tokenizer())

    with pytest.raises(ScaloraError, match=message):
        run()


def test_missing_library(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ScaloraError, match=r"needs sklearn\.metrics: pip install 'scalora\[arena\]'"):
        task(tmp_path, metric="f1").score(tokenized.bert(), tokenized.tokenizer())


@pytest.mark.real
def test_real_minilm_scores_headlines():
    from scalora.models.load import load_model

    data = {"train": "sarcasm", "train_size": 32, "test_size": 64}
    built = build_task(ClassificationSpec(data=data, text="headline"))
    model, tokenizer = load_model("minilm-l6-v2", head="sequence-classification", num_labels=built.num_labels)
    score = built.score(model, tokenizer)
    assert 0 < score.metrics["nll"] < 2


def test_a_column_of_texts_is_not_taken_for_the_label(tmp_path):
    rows = [{"s": f"s {i}", "t": "x", "label": f"a text of its own, the {i}th"} for i in range(30)]
    with pytest.raises(
        ScaloraError, match=r"task.label: column 'label' has 30 different values in 30 .* is it the label"
    ):
        task(tmp_path, rows).labels  # noqa: B018
    assert len(task(tmp_path, [*rows, *rows, *rows]).labels) == 30
    assert len(task(tmp_path, rows, labels=[row["label"] for row in rows]).labels) == 30
