"""Tags for words: entities counted as CoNLL counts them, tokens of every kind of tokenizer, and whole runs."""

import pytest
import torch
from tokenizers import normalizers
from transformers import BertForTokenClassification

from helpers import tokenized, whole_runs
from helpers.heads import tagged as rows
from helpers.heads import tagger as bert
from scalora.common.errors import ScaloraError
from scalora.common.quiet import quiet
from scalora.tasks import build_task
from scalora.tasks.entities import Entity, entities, entity_scores, has_prefixes
from scalora.tasks.labels import Labels
from scalora.tasks.token_classification import TokenClassificationSpec


def task(folder, content, data=None, **fields):
    path = tokenized.write_jsonl(folder / "rows.jsonl", content)
    spec = TokenClassificationSpec(
        data={"train": path, "test": path, "columns": {"id": "id"}, **(data or {})}, **fields
    )
    return build_task(spec)


def test_entities_of_a_row_by_hand():
    """CoNLL's own traps: an I that begins, a B that parts, another type, the end of the row."""
    tags = ["I-PER", "I-PER", "B-PER", "O", "B-LOC", "I-ORG", "O", "I-LOC"]
    assert entities(tags, prefixed=True) == [
        Entity("PER", 0, 2), Entity("PER", 2, 3), Entity("LOC", 4, 5), Entity("ORG", 5, 6), Entity("LOC", 7, 8),
    ]  # fmt: skip
    assert entities(["B-A", "I-A", "E-A", "E-A", "S-B", "I-B"], prefixed=True) == [
        Entity("A", 0, 3), Entity("A", 3, 4), Entity("B", 4, 5), Entity("B", 5, 6),
    ]  # fmt: skip
    assert entities(["PER", "PER", "O", "LOC", "PER"], prefixed=False) == [
        Entity("PER", 0, 2), Entity("LOC", 3, 4), Entity("PER", 4, 5),
    ]  # fmt: skip


def test_scores_by_hand():
    """Three entities are there, two are found, one of them whole: 1/2, 1/3, and 2·1/(3 + 2)."""
    there = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["O"]]
    assert entity_scores(there, found, prefixed=True) == {"f1": 2 / 5, "precision": 1 / 2, "recall": 1 / 3}
    assert entity_scores([["O"]], [["O"]], prefixed=True) == {"f1": 0, "precision": 0, "recall": 0}


def test_kinds_of_tags_are_told_apart():
    assert has_prefixes(["O", "B-PER", "I-PER"])
    assert not has_prefixes(["NOUN", "VERB", "O"])
    assert not has_prefixes(["O"])
    with pytest.raises(ScaloraError, match=r"task\.tags: 'LOC' has no prefix as 'B-PER' has"):
        has_prefixes(["O", "B-PER", "LOC"])
    with pytest.raises(ScaloraError, match=r"task\.tags: 'o' would be a type of entities: write 'O'"):
        has_prefixes(["b-per", "i-per", "o"])


def first_tokens(tokenizer, words, tmp_path):
    content = [{"tokens": words, "tags": ["x", *["y"] * (len(words) - 1)]}]
    (example,) = task(tmp_path, content, {"columns": {}}).train_dataset(tokenizer)
    assert set(example["labels"]) <= {-100, 0, 1}
    return [i for i, label in enumerate(example["labels"]) if label != -100], example["input_ids"]


def test_labels_are_on_the_first_token_of_each_word(tmp_path):
    words = ["hello", "123apples", "Question:", "é", "yes"]
    tokenizer = tokenized.byte_level(ending=True)
    found, ids = first_tokens(tokenizer, words, tmp_path)
    assert len(found) == len(words)
    assert tokenizer.decode(ids[found[1] : found[2]]).strip() == "123apples"
    assert ids[found[3] :][: found[4] - found[3]] == tokenizer(" é", add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    # Where a tokenizer reads lists of words itself, its own word_ids say the same.
    word_level = tokenized.tokenizer()
    words = ["the", "cat", "cat-sky", "red"]
    found, ids = first_tokens(word_level, words, tmp_path)
    read = word_level(words, is_split_into_words=True)
    assert ids == read["input_ids"]
    assert found == [read.word_ids().index(i) for i in range(4)]


def test_words_without_tokens_are_outside(tmp_path):
    tokenizer = tokenized.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Nmt()  # drops control characters
    content = [{"tokens": ["cat", "\u0001", "dog"], "tags": "A O B"}, {"tokens": ["\u0001"], "tags": "O"}]
    with pytest.raises(ScaloraError, match=r"words have no tokens in .*rows\.jsonl, line 2, row 2"):
        task(tmp_path, content, {"columns": {}}).train_dataset(tokenizer)
    built = task(tmp_path, content, {"columns": {}, "max_bad_rows": 1})
    (example,) = built.train_dataset(tokenizer, "test")
    assert example["labels"] == [0, 1]
    model = bert()
    model.classifier = torch.nn.Linear(16, 3)
    assert built.score(model, tokenizer).predictions[0].predicted.split()[1] == "O"


def test_scores_are_those_of_the_logits_and_do_not_depend_on_the_batch(tmp_path):
    built, model, tokenizer = task(tmp_path, rows(12)), bert(), tokenized.tokenizer()
    model.classifier = torch.nn.Linear(16, built.num_labels)
    score = built.score(model, tokenizer, batch_size=5)
    one = built.score(model, tokenizer, batch_size=1)
    assert score.metrics == pytest.approx(one.metrics)
    said, right, nats = [], 0, []
    for row in rows(12):
        with torch.no_grad():
            logits = model.eval()(**tokenizer([" ".join(row["tokens"])], return_tensors="pt")).logits[0]
        said.append([built.labels[place] for place in logits.argmax(-1)])
        right += sum(a == b for a, b in zip(said[-1], row["tags"], strict=True))
        nats += [-logits[i].log_softmax(-1)[built.labels.index(tag)].item() for i, tag in enumerate(row["tags"])]
    tags = [row["tags"] for row in rows(12)]
    assert [each.predicted.split() for each in score.predictions] == said
    assert score.metrics == pytest.approx(
        {**entity_scores(tags, said, prefixed=True), "accuracy": right / len(nats), "nll": sum(nats) / len(nats)},
        rel=1e-5,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": ["O"]}, "task.tags: 5 words with 1 tags in .*line 2, row 2"),
        ({"tokens": []}, "task.tokens: column 'tokens' is empty in"),
        ({"tokens": 7}, "is 7, and no list in .*row 2"),
        ({"tags": ["O", "O", "O", "O", ""]}, "task.tags: column 'tags', number 5 of 5, is empty in"),
        ({"tokens": ["a", "b", None, "d", "e"]}, "number 3 of 5, is null in"),
        (
            {"tokens": "['the' 'cat']", "tags": "['O' 'O']"},
            r"is .*'the' 'cat'.* in .*row 2, a list that is not written",
        ),
        (
            {"tokens": "a b", "tags": "[0 1]"},
            r"column 'tags' is '\[0 1\]' in .*row 2, a list that is not written in JSON",
        ),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, change, message):
    content = rows(10)
    content[1] |= change
    if "tokens" not in change:
        content[1]["tokens"] = ["the", "cat", "is", "red", "a"]
    with pytest.raises(ScaloraError, match=message):
        _ = task(tmp_path, content).splits
    assert len(task(tmp_path, content, {"max_bad_rows": 1}).rows("test")) == 9


def test_labels_may_be_listed_and_tags_numbers(tmp_path):
    content = [{"tokens": "the cat", "tags": [0, 1]}, {"tokens": '["the", "new sky"]', "tags": "O B-PET"}]
    listed = {"labels": ["O", "B-PET"]}
    built = task(tmp_path, content, {"columns": {}}, **listed)
    found = [each["labels"] for each in built.train_dataset(tokenized.tokenizer(), "test")]
    assert found == [[0, 1], [0, 1, -100]]
    content[1] = {"tokens": "a", "tags": "B-Pet"}
    with pytest.raises(ScaloraError, match=r"'B-Pet' in .*row 2 is not one of the labels .*differs only in case"):
        _ = task(tmp_path, content, {"columns": {}}, **listed).splits
    with pytest.raises(ScaloraError, match=r"the tags are 0, 1, …, which do not say what is an entity: name them in"):
        _ = task(tmp_path, [{"tokens": "the cat", "tags": [0, 1]}], {"columns": {}}).labels
    numbers = task(tmp_path, [{"tokens": "the cat", "tags": [0, 1]}], {"columns": {}}, metric="accuracy")
    assert numbers.labels == ["0", "1"]
    content = [{"tokens": "the cat", "tags": "DET NOUN"}, {"tokens": "the cat", "tags": "DET VERB"}]
    assert task(tmp_path, content, {"columns": {}}, metric="accuracy").labels == ["DET", "NOUN", "VERB"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    quiet()
    folder = tmp_path_factory.mktemp("tags")
    bert().save_pretrained(folder / "model")
    tokenized.tokenizer().save_pretrained(folder / "model")
    tokenized.write_jsonl(folder / "entities.jsonl", rows())
    return whole_runs.documented("token_classification", folder)


INPUTS = {"input_ids": torch.tensor([[4, 5, 6, 7]])}


def test_a_whole_run(recipe, tmp_path):
    run = whole_runs.check_run(recipe, INPUTS, tmp_path, "nll", "f1")
    assert set(run.after.metrics) == {"f1", "precision", "recall", "accuracy", "nll"}
    saved = BertForTokenClassification.from_pretrained(tmp_path / "merged")
    assert list(saved.config.id2label.values()) == ["B-PET", "B-PLACE", "I-PLACE", "O"]


def test_with_other_methods(recipe, tmp_path):
    whole_runs.check_other_methods(recipe, INPUTS, tmp_path)


def test_mistakes_get_one_line(recipe):
    assert "no column 'token' in" in whole_runs.refused(recipe, "task.tokens=token")
    assert "unknown key 'task.tag'; did you mean 'tags'?" in whole_runs.refused(recipe, "task.tag=tags")
    assert "task.metric is 'recall'" in whole_runs.refused(recipe, "task.metric=recall")
    said = whole_runs.refused(recipe, "model=smollm2-135m-instruct", "task.max_length=2")
    assert "cannot be" in said or "task.max_length" in said


def test_a_number_is_no_place_where_labels_are_numbers():
    names = Labels([1, 2, 3], list, "task.tags", "tags")
    assert [names.place(value, "row 1", by_number=True) for value in (1, "3", 2.0)] == [0, 2, 1]
    with pytest.raises(ScaloraError, match="0 in row 1 is not one of the labels"):
        names.place(0, "row 1", by_number=True)
