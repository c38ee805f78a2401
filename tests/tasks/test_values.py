"""One rule for labels and texts, whatever format they are in."""

import json
import math
from decimal import Decimal

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.tasks import build_task
from scalora.tasks.classification import ClassificationSpec
from scalora.tasks.completion import CompletionSpec
from scalora.tasks.data.values import flaw, label_key, label_text, number

GOOD = [("a b", "yes"), ("c d", "no"), ("e f", "yes")]
FORMATS = ("csv", "tsv", "json", "jsonl", "parquet")
OF_OBJECTS = ("json", "jsonl", "parquet")


def write(folder, ending, pairs):
    rows = [{"text": text, "label": label} for text, label in pairs]
    path = folder / f"x.{ending}"
    if ending in ("csv", "tsv"):
        pandas.DataFrame(rows).to_csv(path, sep="," if ending == "csv" else "\t", index=False)
    elif ending == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def built(folder, ending, pairs, missing="refuse", **fields):
    path = write(folder, ending, pairs)
    data = {"train": path, "test": path, "missing": missing}
    return build_task(ClassificationSpec(data=data, text="text", **fields))


def place(ending, row):
    line = {"csv": row + 1, "tsv": row + 1, "jsonl": row, "json": 1, "parquet": None}[ending]
    return rf"x\.{ending}{'' if line is None else f', line {line}'}, row {row}\b"


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("value", ["", "  ", "NaN", "nan", "None", "NA", "<NA>", "null", " N/A "])
def test_missing_labels_and_texts(tmp_path, ending, value):
    for pair, field in (((value, "yes"), "text"), (("g", value), "label")):
        with pytest.raises(ScaloraError, match=rf"task\.{field}: .* in .*{place(ending, 4)}"):
            _ = built(tmp_path, ending, [*GOOD, pair]).splits
    # Where it is said that they are none, they are words as any others.
    kept = built(tmp_path, ending, [*GOOD, ("g", value)], missing="keep")
    assert kept.labels == sorted(["no", "yes", value.strip()])
    assert len(built(tmp_path, ending, [*GOOD, ("g", value)], labels=["yes", "no", value]).splits.test) == 4
    assert built(tmp_path, ending, [*GOOD, (value, "no")], missing="keep").splits.test[3]["text"] == value


@pytest.mark.parametrize("ending", FORMATS)
def test_nothing_at_all(tmp_path, ending):
    for pair in ((None, "yes"), ("g", None)):
        with pytest.raises(ScaloraError, match=rf"(null|empty|is '') in .*{place(ending, 4)}"):
            _ = built(tmp_path, ending, [*GOOD, pair]).splits


@pytest.mark.parametrize("ending", OF_OBJECTS)
@pytest.mark.parametrize("value", [[1.0], {"a": "b"}])
def test_values_that_are_no_text(tmp_path, ending, value):
    pairs = [([2.0] if isinstance(value, list) else {"a": "c"}, "no"), (value, "yes")]
    with pytest.raises(ScaloraError, match=r"task\.text: column 'text' is .*, a (list|dict) and no text in .*row 1\b"):
        _ = built(tmp_path, ending, pairs).splits
    with pytest.raises(ScaloraError, match=rf"task\.label: column 'label' is .* and no text in .*{place(ending, 1)}"):
        _ = built(tmp_path, ending, [(label, text) for text, label in pairs]).splits


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud83d"', '"a\\u0000b"', "[]", "null"])
@pytest.mark.parametrize("column", ["text", "label"])
def test_json_that_is_no_text(tmp_path, value, column):
    rows = [json.dumps({"text": text, "label": label}) for text, label in GOOD]
    bad = {"text": '"g"', "label": '"yes"', column: value}
    rows.append(f'{{"text": {bad["text"]}, "label": {bad["label"]}, "other": NaN}}')
    for name, content in (("x.jsonl", "\n".join(rows)), ("x.json", "[" + ",\n".join(rows) + "]")):
        (tmp_path / name).write_text(content)
        data = {"train": name, "test": name, "folder": str(tmp_path)}
        for spec in (
            ClassificationSpec(data=data, text="text"),
            CompletionSpec(data=data, prompt="Q {text}:", completion=" {label}"),
        ):
            with pytest.raises(ScaloraError, match=rf"column '{column}' .* in .*{name}, line 4, row 4\b"):
                _ = build_task(spec).splits


def test_a_column_that_is_not_asked_for_may_hold_anything(tmp_path):
    others = [math.nan, [1], None]
    rows = [{"text": text, "label": label, "o": o} for (text, label), o in zip(GOOD, others, strict=True)]
    path = tokenized.write_jsonl(tmp_path / "x.jsonl", rows)
    assert len(build_task(ClassificationSpec(data={"train": path, "test": path}, text="text")).splits.test) == 3


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 1.0, "1", "0", 0.0, -0.0], ["0", "1"]),
        ([1e2, "100", "1e2", 7], ["7", "100"]),
        (["pos ", " pos", "pos", "neg\t"], ["neg", "pos"]),
        ([True, "true", "TRUE", False, "False"], ["False", "TRUE"]),
        (["true", "false"], ["false", "true"]),
        (["01", "1"], ["01", "1"]),
        ([12345678901234567890123, "12345678901234567890124"], ["12345678901234567890123", "12345678901234567890124"]),
    ],
)
def test_labels_that_are_equal_are_one(tmp_path, values, labels):
    task = built(tmp_path, "jsonl", [(f"t{i}", value) for i, value in enumerate(values)])
    assert task.labels == labels
    targets = [example["labels"] for example in task.train_dataset(tokenized.tokenizer(), "test").examples]
    assert [label_key(labels[target]) for target in targets] == [label_key(value) for value in values]


@pytest.mark.parametrize(
    ("labels", "values"), [([0, 1], [1.0, "0"]), (["true", False], [True, "False"]), (["a ", "b"], ["a", " b"])]
)
def test_labels_of_a_recipe_are_those_of_the_rows(tmp_path, labels, values):
    pairs = [(f"t{i}", value) for i, value in enumerate(values)]
    task = built(tmp_path, "jsonl", pairs, labels=[*labels, "other"])
    assert len(task.train_dataset(tokenized.tokenizer(), "test")) == len(values)
    data = {"train": task.data.train, "test_size": 1, "values": {"label": labels}}
    assert len(build_task(ClassificationSpec(data=data, text="text")).splits.test) == 1


@given(
    st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.decimals(allow_nan=False, allow_infinity=False)
)
def test_equal_numbers_have_one_text(value):
    text = label_text(value)
    assert label_text(text) == text
    assert label_text(str(value)) == text
    assert Decimal(text) == Decimal(str(value))
    assert label_text(f" {text} ") == text
    if value == 0:
        assert text == "0"


@given(st.text())
def test_a_label_is_its_text_without_the_space_around_it(text):
    assert label_text(text) == text.strip() or number(text) is not None


@pytest.mark.parametrize("value", ["1_000", "nan", "inf", "0x10", "١", "", True, None, [1], 10**400, "1e999", math.inf])
def test_no_numbers(value):
    assert number(value) is None


def test_flaws():
    assert all(flaw(value) is None for value in ("a", "", 1, 10**400, 1.5, True, Decimal("1.5")))
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert all(flaw(value) for value in (None, math.nan, math.inf, b"a", [], {}, "\ud83d", "a\0", deep))
