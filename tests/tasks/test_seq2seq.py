"""Texts for texts by an encoder and a decoder: what is read and written, nats and ROUGE, and whole runs."""

import sys

import pytest
import torch

from helpers import tokenized, whole_runs
from helpers.heads import bart, t5
from helpers.heads import texts_for_texts as rows
from scalora.common.errors import ScaloraError
from scalora.common.quiet import quiet
from scalora.models.heads import head_of_architecture
from scalora.tasks import build_task
from scalora.tasks.seq2seq import Seq2SeqSpec


def task(folder, content, data=None, **fields):
    path = tokenized.write_jsonl(folder / "rows.jsonl", content)
    data = {"train": path, "test": path, "columns": {"id": "id"}, **(data or {})}
    return build_task(Seq2SeqSpec(data=data, **fields))


def test_what_is_read_and_written(tmp_path):
    built, tokenizer = task(tmp_path, rows(2), prefix="why ", input="{input} on {target}"), tokenized.tokenizer()
    dataset = built.train_dataset(tokenizer, "test")
    assert tokenizer.decode(dataset[1]["input_ids"]) == "why the dog is dog b on dog dog"
    assert tokenizer.decode(dataset[1]["labels"]) == "dog dog <eos>"
    # A tokenizer that ends texts itself ends them once.
    ending = tokenized.byte_level(ending=True)
    (example, _) = task(tmp_path, rows(2)).train_dataset(ending, "test")
    assert example["labels"] == ending("cat cat")["input_ids"]
    assert example["labels"].count(2) == 1
    batch = built.collator(tokenizer)([dataset[0], {"input_ids": [5], "labels": [6]}])
    assert batch["attention_mask"].tolist()[1] == [1, *[0] * (len(dataset[0]["input_ids"]) - 1)]
    assert batch["labels"].tolist()[1] == [6, -100, -100]


def test_long_inputs_are_cut_and_rows_of_long_targets_left_out(tmp_path):
    content = rows(10)
    content[3]["target"] = "cat " * 9
    built = task(tmp_path, content, max_length=4, max_target_length=5)
    dataset = built.train_dataset(tokenized.tokenizer(), "test")
    assert (len(dataset), dataset.truncated) == (9, 9)
    assert built.notes[1:] == [
        "1 of 10 test rows need more tokens than task.max_target_length, 5, and are left out: the first, "
        f"{tmp_path}/rows.jsonl, line 4, row 4, needs 10"
    ]


@pytest.mark.parametrize("make", [t5, bart])
def test_scores_are_those_of_each_row_alone(tmp_path, make):
    from rouge_score.rouge_scorer import RougeScorer

    model, tokenizer = make().eval(), tokenized.tokenizer()
    content = [{**row, "input": row["input"] + " red" * (i % 4)} for i, row in enumerate(rows(9))]
    built = task(tmp_path, content, max_new_tokens=6)
    score = built.score(model, tokenizer, batch_size=4)
    nats, written = [], []
    for example in built.train_dataset(tokenizer, "test"):
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logprobs = model(input_ids=ids, labels=labels).logits.log_softmax(-1)
        nats += [-logprobs[0, i, label].item() for i, label in enumerate(example["labels"])]
        found = [model.config.decoder_start_token_id]  # greedy, by hand
        while len(found) < 7 and (found[-1] != 2 or len(found) == 1):
            with torch.no_grad():
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([found])).logits
            found.append(logits[0, -1].argmax().item())
        if make is bart and len(found) == 7:
            found[-1] = 2  # which its configuration forces
        written.append(tokenizer.decode(found, skip_special_tokens=True))
    assert score.metrics["nll"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert [p.predicted for p in score.predictions] == written
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    found = [scorer.score(row["target"], text)["rougeL"].fmeasure for row, text in zip(content, written, strict=True)]
    assert score.metrics["rougeL"] == pytest.approx(sum(found) / 9)
    assert score.primary == "rougeL"
    assert set(built.score(model, tokenizer).metrics) == {"rouge1", "rouge2", "rougeL", "nll"}


def test_rouge_of_what_is_right_is_one(tmp_path, monkeypatch):
    built, tokenizer = task(tmp_path, rows(5)), tokenized.tokenizer()
    monkeypatch.setattr(built, "_write", lambda *_: [row["target"] for row in rows(5)])
    metrics = built.score(t5(), tokenizer).metrics
    assert (metrics["rouge1"], metrics["rouge2"], metrics["rougeL"]) == (1, 1, 1)
    plain = task(tmp_path, rows(5), metric="nll").score(t5(), tokenizer)
    assert plain.metrics == {"nll": pytest.approx(metrics["nll"])}


def test_targets_that_rouge_cannot_read_are_told(tmp_path):
    content = rows(5)
    content[2]["target"] = "лето"
    built = task(tmp_path, content)
    built.train_dataset(tokenized.tokenizer(), "test")
    assert "1 of 5 test targets have none, so that they score 0: the first is in" in built.notes[-1]


def test_targets_that_the_tokenizer_cannot_write_are_told(tmp_path):
    content = rows(5)
    content[2]["target"] = "cat {"
    built = task(tmp_path, content)
    built.train_dataset(tokenized.tokenizer(), "test")
    assert built.notes[1:] == [
        "task.target: the tokenizer has no tokens for parts of 1 of 5 test targets, of which the model learns <unk>: "
        f"the first is in {tmp_path}/rows.jsonl, line 3, row 3"
    ]


def test_without_rouge_score_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ScaloraError, match=r"pip install 'scalora\[rouge\]', or set task\.metric to nll"):
        task(tmp_path, rows(5))
    task(tmp_path, rows(5), metric="nll").score(t5(), tokenized.tokenizer())


def test_classes_are_known_by_their_names():
    names = {"T5ForConditionalGeneration": "seq2seq-lm", "MarianMTModel": "seq2seq-lm", "BartForCausalLM": "causal-lm",
             "Gemma3ForConditionalGeneration": "causal-lm", "GPT2LMHeadModel": "causal-lm",
             "T5ForSequenceClassification": "sequence-classification"}  # fmt: skip
    assert {name: head_of_architecture(name) for name in names} == names


@pytest.fixture(scope="module", params=["t5", "bart"])
def recipe(request, tmp_path_factory):
    quiet()
    folder = tmp_path_factory.mktemp("texts")
    {"t5": t5, "bart": bart}[request.param]().save_pretrained(folder / "model")
    tokenized.tokenizer().save_pretrained(folder / "model")
    content = [{"article": f"{row['input']} {'the ' * (row['id'] // 15)}", "summary": row["target"]} for row in rows()]
    tokenized.write_jsonl(folder / "articles.jsonl", content)
    limits = {"max_length": 30, "max_target_length": 8, "max_new_tokens": 8}  # BART has 40 positions
    return whole_runs.documented("seq2seq", folder, task=limits)


INPUTS = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "labels": torch.tensor([[5, 6, 2]])}


def test_a_whole_run(recipe, tmp_path):
    whole_runs.check_run(recipe, INPUTS, tmp_path, "nll", "rougeL")


def test_with_other_methods(recipe, tmp_path):
    whole_runs.check_other_methods(recipe, INPUTS, tmp_path)


def test_mistakes_get_one_line(recipe):
    assert "no column 'text' in" in whole_runs.refused(recipe, "task.input=text")
    assert "did you mean 'prefix'?" in whole_runs.refused(recipe, "task.prefx=x")
    assert "task.metric is 'rouge'" in whole_runs.refused(recipe, "task.metric=rouge")
    assert "choose a task for a causal-lm" in whole_runs.refused(recipe, "model=smollm2-135m-instruct")
    if "bart" in (recipe.parent / "model" / "config.json").read_text():
        long = ("task.max_length=80", f"task.prefix={'the ' * 60}")
        assert "task.max_length is 80, but Bart" in whole_runs.refused(recipe, *long)
        assert "task.max_new_tokens is 41, but Bart" in whole_runs.refused(recipe, "task.max_new_tokens=41")
