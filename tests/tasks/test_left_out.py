"""Rows that are too long or malformed: left out, counted and named once, in every kind of task and form of file."""

import re

import pytest
from tokenizers import normalizers

from helpers import chats, heads, images, tokenized
from helpers.every_kind import CHAT, KINDS, rows, task
from scalora.common.errors import ScaloraError
from scalora.tasks import all_tasks
from scalora.tasks.data.rows import DataSpec, load_splits

LONG = {
    "chat": {"messages": [CHAT[0], {"role": "assistant", "content": "sat on " * 30}]},
    "completion": {"b": "sat on " * 30},
    "multiple_choice": {"choices": ["red", "blue " * 60]},
    "preference": {"other": " ran" * 90},
    "token_classification": {"tokens": ["the"] * 90, "tags": ["O"] * 90},
}
# What only the tokenizer, or a look at all training rows, finds.
LATE = {
    "classification": {"label": "unheard of"},
    "completion": {"b": "\u0001 on"},
    "image_classification": {"label": "unheard of"},
    "multiple_choice": {"choices": ["red", "\u0001"]},
    "preference": {"other": "\u0001"},
    "seq2seq": {"b": "\u0001"},
    "token_classification": {"tags": ["O", "B-NEW"]},
}
REFUSING = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}" + chats.CHATML


@pytest.fixture(autouse=True)
def _an_image(tmp_path):
    images.picture(0).save(tmp_path / "there.png")


def test_all_kinds_with_data_are_here():
    assert KINDS.keys() == all_tasks().keys() - {"recall"}


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_rows_are_left_out_up_to_a_number(tmp_path, kind):
    bad = KINDS[kind][1]
    content = rows(kind, bad, bad)
    with pytest.raises(ScaloraError, match=r"rows\.jsonl, line 5, row 5"):
        _ = task(tmp_path, kind, content).splits
    built = task(tmp_path, kind, content, {"max_bad_rows": 2})
    assert [row["id"] for row in built.rows("test")] == list(range(9))
    for name, note in zip(("train", "test"), built.notes, strict=False):
        assert note.startswith(
            f"task.data.{name}: 2 of 11 rows are malformed and are left out (max_bad_rows); the first"
        )
        assert "rows.jsonl, line 5, row 5" in note
    with pytest.raises(ScaloraError, match=r"2 of 11 rows are malformed, and max_bad_rows is 1; the first: .*row 5"):
        _ = task(tmp_path, kind, content, {"max_bad_rows": 1}).splits
    with pytest.raises(ScaloraError, match="2 of 2 rows are malformed, and max_bad_rows is 5"):
        _ = task(tmp_path, kind, content[4:6], {"max_bad_rows": 5}).splits


def measured(built, kind, tokenizer):
    model = heads.tagger(len(tokenizer)) if kind == "token_classification" else chats.llama()
    if kind == "preference":
        built.refer(model, tokenizer, {"test": built.train_dataset(tokenizer, "test")}, 8, None)
    return built.score(model, tokenizer)


@pytest.mark.parametrize("kind", LATE)
def test_rows_that_are_found_malformed_late_are_left_out_too(tmp_path, kind):
    tokenizer = chats.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Nmt()  # drops control characters
    test = tokenized.write_jsonl(tmp_path / "test.jsonl", rows(kind, LATE[kind]))

    def built(allowed):
        return task(tmp_path, kind, rows(kind), {"test": test, "max_bad_rows": allowed})

    with pytest.raises(ScaloraError, match=r"test\.jsonl, line 5, row 5"):
        built(0).train_dataset(tokenizer, "test")
    kept = built(1)
    assert len(kept.train_dataset(tokenizer, "test")) == 9
    (note,) = [note for note in kept.notes if "malformed" in note]
    assert note.startswith("task.data.test: 1 of 10 rows are malformed and are left out (max_bad_rows); the first: ")
    assert "test.jsonl, line 5, row 5" in note


def test_a_reference_without_an_answer_is_malformed(tmp_path):
    tokenizer = chats.tokenizer()
    content = rows("completion", {"b": "none"})
    with pytest.raises(ScaloraError, match=r"task\.answer: '\[s\]at' finds nothing in .*rows\.jsonl, line 5, row 5"):
        task(tmp_path, "completion", content, answer="[s]at").train_dataset(tokenizer, "test")
    built = task(tmp_path, "completion", content, {"max_bad_rows": 1}, answer="[s]at", max_new_tokens=2)
    assert len(built.train_dataset(tokenizer, "test")) == 9
    assert len(built.train_dataset(tokenizer)) == 10
    assert len(built.score(chats.llama(), tokenizer).predictions) == 9


@pytest.mark.parametrize("kind", LONG)
def test_one_long_row_does_not_lose_a_run(tmp_path, kind):
    content = rows(kind, LONG[kind])
    tokenizer = chats.tokenizer()
    built = task(tmp_path, kind, content, max_length=60)
    score = measured(built, kind, tokenizer)
    alone = measured(task(tmp_path, kind, rows(kind), max_length=60), kind, tokenizer)
    assert score.metrics == pytest.approx(alone.metrics)
    assert len(score.predictions) == 9
    assert len(built.train_dataset(tokenizer, "test")) == len(built.train_dataset(tokenizer)) == 9
    notes = [note for note in built.notes if "task.max_length, 60, and are left out: the first, " in note]
    assert len(notes) == 2
    assert all("1 of 10 t" in note and "line 5, row 5, needs " in note for note in notes)
    task(tmp_path, kind, content, {"max_long_rows": 1}, max_length=60).train_dataset(tokenizer)
    with pytest.raises(ScaloraError, match=r"max_long_rows is 0, but 1 of 10 train rows need .*row 5, needs \d+\)"):
        task(tmp_path, kind, content, {"max_long_rows": 0}, max_length=60).train_dataset(tokenizer)


def test_conversations_that_a_template_refuses_are_malformed(tmp_path):
    tokenizer = chats.tokenizer(REFUSING)
    content = rows("chat", {"messages": CHAT + CHAT})
    with pytest.raises(ScaloraError, match=r"no such conversation as that in .*line 5, row 5 \(too many\)"):
        task(tmp_path, "chat", content).train_dataset(tokenizer)
    built = task(tmp_path, "chat", content, {"max_bad_rows": 1})
    assert len(built.train_dataset(tokenizer)) == 9
    (note,) = built.notes[1:]
    assert note.startswith(
        "task.data.train: 1 of 10 rows are malformed and are left out (max_bad_rows); the first: task"
    )


FILES = {
    "lines.jsonl": '{"text": "a"}\n{"text": "b"\n[1]\n{"text": "c", "text": "d"}\n{"text": "e"}\n',
    "table.csv": "text,other\na,1\nb\nc,1,2\n,,\ne,1\n",
    "table.tsv": "text\tother\na\t1\nb\nc\t1\t2\n\t\t\ne\t1\n",
}


@pytest.mark.parametrize("name", FILES)
def test_lines_that_are_no_rows_are_malformed(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name])
    notes = []

    def load(allowed):
        data = DataSpec(train=str(path), test=str(path), max_bad_rows=allowed)
        return load_splits(data, ("text",), say=notes.append)

    line = "line 2" if name == "lines.jsonl" else "line 3"
    with pytest.raises(ScaloraError, match=line):
        load(0)
    with pytest.raises(ScaloraError, match=f"3 of 5 rows are malformed, and max_bad_rows is 2; the first: .*{line}"):
        load(2)
    assert [row["text"] for row in load(3).test] == ["a", "e"]
    assert sum("3 of 5 rows are malformed and are left out" in note and line in note for note in notes) == 2


def test_malformed_rows_are_counted_by_their_source(tmp_path):
    """Whatever finds them, and whatever splits they are in."""
    tokenizer = chats.tokenizer(REFUSING)
    content = rows("chat", {"messages": CHAT[:1]}, *({"messages": CHAT + CHAT} for _ in range(6)))
    for number, row in enumerate(content):  # none repeats another
        row["messages"] = [{**each, "content": f"{each['content']} {number}"} for each in row["messages"]]

    def learnt(allowed, **data):
        data = {"columns": {}, "test": None, "test_size": 8, "max_bad_rows": allowed, **data}
        built = task(tmp_path, "chat", content, data)
        for split in ("train", "test"):
            built.train_dataset(tokenizer, split)
        return [int(note.split(": ")[1].split()[0]) for note in built.notes if "are malformed" in note]

    counts = learnt(7)
    assert len(counts) == 3, "the reader finds one, the template others in train and in test"
    assert sum(counts) == 7
    message = r"task\.data\.train: 7 of 16 rows are malformed, and max_bad_rows is 6; the first: .*line 5, row 5"
    with pytest.raises(ScaloraError, match=message):
        learnt(6)
    own = tokenized.write_jsonl(tmp_path / "own.jsonl", content)
    assert learnt(7, test=own, test_size=None) == [1, 1, 6, 6], "each source by itself"


@pytest.mark.parametrize("content", ['{"text": "a"}\n{"text": null}\n{"te\n', "text,b\nNaN,1\nc\nd,1\n"])
def test_the_first_malformed_row_is_the_first_of_the_file(tmp_path, content):
    """Though lines that are no rows are found before cells that cannot be used."""
    path = tmp_path / ("x.csv" if "," in content.splitlines()[0] else "x.jsonl")
    path.write_text(content)
    first = rf"the first: task.* in .*{path.name}, line 2, row"

    def built(allowed):
        data = {"train": str(path), "test": str(path), "columns": {"a": "text"}, "max_bad_rows": allowed}
        return task(tmp_path, "text", [], data)

    kept = built(2)
    assert len(kept.rows("test")) == 1
    assert re.search(rf"2 of 3 rows are malformed and are left out \(max_bad_rows\); {first}", kept.notes[0])
    with pytest.raises(ScaloraError, match=f"2 of 3 rows are malformed, and max_bad_rows is 1; {first}"):
        _ = built(1).splits


@pytest.mark.parametrize("seed", range(4))
def test_of_shuffled_rows_the_first_is_the_first_of_the_file(tmp_path, seed):
    bad = [{"messages": CHAT + CHAT, "a": f"bad {number}"} for number in range(3)]
    long = [{"messages": [CHAT[0], {**CHAT[1], "content": "sat on " * 30}], "a": f"long {i}"} for i in range(3)]
    data = {"train_size": 15, "max_bad_rows": 3, "seed": seed}
    data |= {"test": tokenized.write_jsonl(tmp_path / "test.jsonl", rows("chat")), "columns": {"id": "a"}}
    built = task(tmp_path, "chat", rows("chat", *bad, *long), data, max_length=60)
    assert len(built.train_dataset(chats.tokenizer(REFUSING))) == 9
    malformed, too_long = (note for note in built.notes if "left out" in note)
    assert "3 of 15 rows are malformed and are left out (max_bad_rows); the first: task" in malformed
    assert "line 5, row 5 (too many)" in malformed
    assert "line 8, row 8, needs" in too_long
