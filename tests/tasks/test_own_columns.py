"""A file's own columns are not replaced because it looks like a published data set."""

import pytest

from helpers import tokenized
from helpers.published import HUB, PLAIN, load
from scalora.common.errors import ScaloraError

# Of LLM-Adapters' JSON for BoolQ.
INSTRUCTION = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
OWN = {
    "MATH": (("problem", "answer"), {"problem": "1+1?", "solution": "Add.", "answer": "2"}),
    "MetaMathQA": (
        ("question", "answer"),
        {"query": "a", "response": "b", "type": "c", "question": "q", "answer": "d"},
    ),
    "BoolQ": (("passage", "question", "answer"), HUB["BoolQ"][0]),
    "PIQA": (("question", "answer", "sol1"), {**HUB["PIQA"][0], "question": "Q", "answer": "A"}),
    "SIQA": (("context", "question", "label"), HUB["SIQA"][0]),
    "HellaSwag": (("question", "label"), {**HUB["HellaSwag"][0], "question": "Q"}),
    "WinoGrande": (("sentence", "option1", "answer"), HUB["WinoGrande"][0]),
    "ARC": (("question", "answer"), {**HUB["ARC"][0], "answer": "A"}),
    "OpenBookQA": (("question", "answer"), {**HUB["OpenBookQA"][0], "question": "Q", "answer": "A"}),
    "commonsense": (("instruction", "answer"), {"instruction": "x\nAnswer format: a/b", "answer": "a"}),
}


@pytest.mark.parametrize("name", OWN)
def test_the_files_own_columns_count_where_none_is_lacking(tmp_path, name):
    asked, row = OWN[name]
    path = tokenized.write_jsonl(tmp_path / "x.jsonl", [row])
    assert load(path, asked) == [{column: row[column] for column in asked}]


REPLACED = {
    "MATH": (("question", "answer"), OWN["MATH"][1], "answer"),
    "MetaMathQA": (("question", "answer"), {"query": "a", "response": "b", "type": "c", "answer": "d"}, "answer"),
    "BoolQ": (("question", "answer", "before"), HUB["BoolQ"][0], "answer"),
    "PIQA": (("question", "answer"), {**HUB["PIQA"][0], "answer": "A"}, "answer"),
    "SIQA": (PLAIN, HUB["SIQA"][0], "question"),
    "HellaSwag": (PLAIN, {**HUB["HellaSwag"][0], "question": "Q"}, "question"),
    "WinoGrande": (("before", "answer"), HUB["WinoGrande"][0], "answer"),
    "ARC": (PLAIN, {**HUB["OpenBookQA"][0], "question": "Q"}, "question"),
    "commonsense": (("question", "answer"), {"instruction": INSTRUCTION, "answer": "true"}, "answer"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_text_of_the_files_own_is_never_replaced_unasked(tmp_path, name):
    asked, row, column = REPLACED[name]
    path = tokenized.write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(ScaloraError, match=rf"a column '{column}' of its own.* the {name} data.*form: published"):
        load(path, asked)
    taken = load(path, [each for each in asked if each != "before"] or asked, form="published")[0]
    assert taken[column] != row[column]
