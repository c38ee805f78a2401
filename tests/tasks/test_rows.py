import json

import pytest
from pydantic import ValidationError

from helpers import tokenized
from scalora.common import packaged
from scalora.common.errors import ScaloraError
from scalora.tasks.data.rows import DataSpec, load_splits


@pytest.fixture
def numbers(tmp_path):
    return tokenized.write_jsonl(tmp_path / "numbers.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(50)])


def load(required=("text", "label"), **fields):
    return load_splits(DataSpec(**fields), required)


def texts(rows):
    return [row["text"] for row in rows]


def test_split_off_without_overlap(numbers):
    splits = load(train=numbers, test_size=10, validation_size=5)
    assert [len(rows) for rows in splits] == [35, 5, 10]
    assert len({text for rows in splits for text in texts(rows)}) == 50
    assert load(train=numbers, test_size=10, validation_size=5) == splits
    assert load(train=numbers, test_size=10, validation_size=5, seed=1).test != splits.test


def test_test_split_does_not_depend_on_other_sizes(numbers):
    one = load(train=numbers, test_size=10, validation_size=5)
    other = load(train=numbers, test_size=10, train_size=3)
    assert one.test == other.test
    assert other.validation is None
    assert len(other.train) == 3
    small = load(train=numbers, test_size=10, validation_size=5, train_size=7)
    assert (small.validation, small.train) == (one.validation, one.train[:7])


def test_repeated_rows_do_not_leak(tmp_path):
    path = tokenized.write_jsonl(tmp_path / "r.jsonl", [{"text": f"t{i % 6}", "label": 0} for i in range(30)])
    splits = load(train=path, test_size=2)
    assert sorted(texts(splits.train) + texts(splits.test)) == [f"t{i}" for i in range(6)]
    with pytest.raises(ScaloraError, match=r"task\.data\.test_size is 6, but there are only 6 rows"):
        load(train=path, test_size=6)


def told(**fields):
    lines = []
    load_splits(DataSpec(**fields), ("text", "label"), say=lines.append)
    return lines


def test_what_becomes_of_repeated_rows_is_said(tmp_path, numbers):
    assert told(train=numbers, test_size=2) == []
    path = tokenized.write_jsonl(tmp_path / "r.jsonl", [{"text": f"t{i % 6}", "label": 0} for i in range(30)])
    lines = told(train=path, test_size=2)
    assert len(lines) == 1
    assert lines[0].startswith("task.data.train: 24 of 30 rows say the same as others")
    with pytest.raises(ScaloraError, match=r"there are only 6 rows .*\(24 of 30 repeat others and are left out\)"):
        load(train=path, test_size=6)
    assert told(train=numbers, test=path) == ["task.data.test: 15 of 30 rows are among those that are trained on"]
    assert [len(rows) for rows in load(train=path, test=path)[::2]] == [30, 30]  # nothing is split off


def test_what_is_left_out_for_its_length_is_said(tmp_path):
    path = tokenized.write_jsonl(tmp_path / "l.jsonl", [{"text": "x" * i, "label": 1} for i in range(1, 9)])
    lines = told(train=path, test_size=1, max_characters=6)
    assert lines == ["task.data.train: 3 of 8 rows have more than 6 characters (max_characters) and are left out"]


def test_own_sources_are_kept_in_order(numbers):
    splits = load(train=numbers, test=numbers, validation=numbers, validation_size=4)
    assert texts(splits.test) == [f"t{i}" for i in range(50)]
    assert len(splits.train) == 50
    assert len(splits.validation) == 4


def test_long_rows_are_left_out_of_every_split(tmp_path):
    rows = [{"text": "x" * (i % 10), "label": "1", "unused": "y" * 100} for i in range(40)]
    path = tokenized.write_jsonl(tmp_path / "long.jsonl", rows)
    splits = load(train=path, test=path, train_size=20, max_characters=6)
    assert {len(row["text"]) for row in splits.test} == set(range(6))  # the label is the sixth character
    assert len(splits.train) == 20
    with pytest.raises(ScaloraError, match=r"train_size is 25, but there are only 24 rows"):
        load(train=path, test=path, train_size=25, max_characters=6)
    empty = tokenized.write_jsonl(tmp_path / "empty.jsonl", [{"text": "long", "label": 1}])
    with pytest.raises(ScaloraError, match=r"max_characters is 2, but the shortest row of .* has 5"):
        load(train=empty, test_size=1, max_characters=2)


def test_only_required_columns_under_our_names(numbers):
    splits = load(("headline", "label"), train=numbers, test_size=1, columns={"headline": "text"})
    assert set(splits.train[0]) == {"headline", "label"}


GLUE = '\ufeffQuality\t#1 ID\t#1 String\r\n1\t7\tHe said " no .\r\n0\t8\t"Quoted" \u2028 line\r\n'


def test_glue_tsv(tmp_path):
    path = tmp_path / "mrpc.tsv"
    path.write_bytes(GLUE.encode())
    rows = load(train=str(path), test=str(path), columns={"text": "#1 String", "label": "Quality"}).test
    assert rows == [{"text": 'He said " no .', "label": "1"}, {"text": '"Quoted" \u2028 line', "label": "0"}]


def test_tsv_without_header(tmp_path):
    path = tmp_path / "cola.tsv"
    path.write_text("gj04\t1\t\tThe cat sat.\ngj04\t0\t*\tCat the sat.\n")
    rows = load(train=str(path), test=str(path), columns={"text": "3", "label": "1"}).test
    assert rows == [{"text": "The cat sat.", "label": "1"}, {"text": "Cat the sat.", "label": "0"}]
    with pytest.raises(ScaloraError, match="if the file has no header, give positions"):
        load(train=str(path), test=str(path))


def test_csv_json_parquet(tmp_path):
    rows = [{"text": 'a, "b"\nc', "label": "1"}, {"text": "d", "label": "0"}]
    (tmp_path / "x.csv").write_text('text,label\n"a, ""b""\nc",1\nd,0\n')
    (tmp_path / "x.json").write_text(json.dumps(rows))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.csv", "x.json", "x.parquet"):
        assert load(train=str(tmp_path / name), test=str(tmp_path / name)).test == rows


def commonsense(instruction, answer):
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


@pytest.mark.parametrize(
    ("instruction", "answer", "expected"),
    [
        (
            "Please choose the correct answer to the question: Who: me?\n\nAnswer1: x y. Answer2: z\n\n"
            "Answer format: answer1/answer2",
            "answer2",
            ("Who: me?", ["x y.", "z"], 1),
        ),
        (
            "Please choose the correct solution to the question: How?\n\nSolution1: a.\n\nSolution2: b.\n\n"
            "Answer format: solution1/solution2",
            "solution1",
            ("How?", ["a.", "b."], 0),
        ),
        (
            "Please choose the correct ending to complete the given sentence: Roof: A man. he\n\nEnding1: a Ending2: b "
            "Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
            "ending3",
            ("Roof: A man. he", ["a", "b", "c", "d"], 2),
        ),
        (
            "Please choose the correct answer to fill in the blank to complete the given sentence: S was better than M "
            "so _ won.\n\nOption1: S Option2: M Answer format: option1/option2",
            "option1",
            ("S was better than M so _ won.", ["S", "M"], 0),
        ),
        (
            "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
            "false",
            ("is it?", ["true", "false"], 1),
        ),
    ],
)
def test_commonsense(tmp_path, instruction, answer, expected):
    path = tmp_path / "c.json"
    path.write_text(json.dumps([commonsense(instruction, answer)]))
    row = load(("question", "choices", "answer", "output"), train=str(path), test=str(path)).test[0]
    assert (row["question"], row["choices"], row["answer"]) == expected
    assert row["output"] == f"the correct answer is {answer}"


def test_a_commonsense_row_that_is_not(tmp_path):
    path = tmp_path / "c.json"
    good = commonsense("Please choose: Q\n\nAnswer1: x Answer2: y\n\nAnswer format: answer1/answer2", "answer1")
    path.write_text(json.dumps([good, {**good, "answer": "answer7"}]))
    with pytest.raises(ScaloraError, match="row 2: not in the form of the commonsense data"):
        load(("question",), train=str(path), test=str(path))


def test_packaged_data(tmp_path, monkeypatch):
    headline = {
        "input": [{"role": "system", "content": "1 or 0"}, {"role": "user", "content": "cat wins"}],
        "ideal": "1",
    }
    social = {"input": [{"role": "user", "content": "Kai ran. Why? A: to go; B: for C; C: no idea."}], "ideal": "C"}
    files = {name: tmp_path / f"{name}.jsonl" for name in ("sarcasm", "socialiqa")}
    tokenized.write_jsonl(files["sarcasm"], [headline])
    tokenized.write_jsonl(files["socialiqa"], [social])
    monkeypatch.setattr(packaged, "fetch", files.__getitem__)
    rows = load(("headline", "label"), train="sarcasm", test="sarcasm").test
    assert rows == [{"headline": "cat wins", "label": 1}]
    rows = load(("question", "choices", "answer"), train="socialiqa", test="socialiqa").test
    assert rows == [{"question": "Kai ran. Why?", "choices": ["to go", "for C", "no idea"], "answer": 2}]
    with pytest.raises(ScaloraError) as error:
        load(("headlin", "label"), train="sarcasm", test="sarcasm")
    assert str(error.value) == (
        "task.data.columns: no column 'headlin' in sarcasm; it has headline, label — did you mean 'headline'?"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": 1, "label": 0}\n\n{"text": \n', r"x\.jsonl, line 3: not valid JSON"),
        ("x.jsonl", "[1, 2]\n", r"x\.jsonl, line 1: expected an object"),
        ("x.jsonl", "", "holds no rows"),
        ("x.jsonl", '{"text": null, "label": 0}\n', r"column 'text' is null in .*x\.jsonl, line 1, row 1;"),
        ("x.jsonl", '{"text": "a", "label": 0}\n{"text": "b"}\n', r"no column 'label' in .*x\.jsonl, line 2, row 2;"),
        ("x.json", '{"text": 1}\n{"text": 2}\n', r"line 2.*rename it to \.jsonl"),
        ("x.json", '{"text": 1}', "expected a list of objects, got dict"),
        ("x.json", "[3]", "row 1: expected an object"),
        ("x.tsv", "text\tlabel\na\t1\nb\n", r"x\.tsv, line 3: 1 fields, but the first line has 2"),
        ("x.csv", "text,label\na,1,2\n", r"x\.csv, line 2: 3 fields"),
        ("x.csv", "text,text\na,1\n", "distinct names"),
        ("x.csv", b"text,label\n\xff,1\n", "not UTF-8"),
        ("x.parquet", "nonsense", "not a readable parquet"),
        ("x.text", "text", "is no data file"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ScaloraError, match=message):
        load(train=str(path), test=str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.csv", r"task\.data\.train: there is no file missing\.csv"),
        ("./folder/data", "is no data file"),
        ("sarcsm", "did you mean 'sarcasm'"),
        ("minilm-l6-v2", "is a packaged model; data sets are sarcasm, socialiqa"),
        ("nobody/nothing:config", "cannot load 'nobody/nothing:config', split 'train', from the hub"),
    ],
)
def test_sources_that_are_not_there(source, message):
    with pytest.raises(ScaloraError, match=message):
        load(train=source, test_size=1)


def test_sizes(numbers):
    with pytest.raises(ScaloraError, match=r"task\.data\.test: there is no test data"):
        load(train=numbers)
    with pytest.raises(ScaloraError, match=r"validation_size is 45, but there are only 40 rows for it and training"):
        load(train=numbers, test_size=10, validation_size=45)
    with pytest.raises(ScaloraError, match=r"train_size is 41, but there are only 40"):
        load(train=numbers, test_size=10, train_size=41)
    with pytest.raises(ValidationError):
        DataSpec(train="x", test_size=0)
    with pytest.raises(ValidationError):
        DataSpec(train="x", tets="y")


@pytest.mark.real
def test_real_sarcasm():
    splits = load(("headline", "label"), train="sarcasm", test_size=2000)
    assert len(splits.train) + len(splits.test) == 28_498  # 28,614 less 116 repeated headlines
    assert {row["label"] for row in splits.train} == {0, 1}
