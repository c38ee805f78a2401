import json

import pytest

from helpers import tokenized
from helpers.published import HUB, PLAIN, load
from scalora.common.errors import ScaloraError
from scalora.tasks.data.rows import DataSpec, load_splits


def plain(row, required=PLAIN):
    return tuple(row[name] for name in required)


LABELS = {"BoolQ": "answer", "WinoGrande": "answer", "ARC": "answerKey", "OpenBookQA": "answerKey"}


@pytest.mark.parametrize("name", HUB)
def test_hub_forms(tmp_path, name):
    row, expected = HUB[name]
    path = tokenized.write_jsonl(tmp_path / "x.jsonl", [row])
    assert plain(load(path, form="published")[0]) == expected
    if name != "SIQA":
        assert plain(load(path)[0]) == expected


def test_parquet_is_as_the_hub_has_it(tmp_path):
    import pyarrow
    import pyarrow.parquet

    row, expected = HUB["ARC"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert plain(load(tmp_path / "x.parquet")[0]) == expected


@pytest.mark.parametrize("name", [name for name in HUB if name != "BoolQ"])
@pytest.mark.parametrize("hidden", [-1, ""])
def test_hidden_labels(tmp_path, name, hidden):
    row = {**HUB[name][0], LABELS.get(name.split()[0], "label"): hidden}
    with pytest.raises(ScaloraError, match=r"x\.jsonl, line 1, row 1: the label is hidden .* this split has no labels"):
        load(tokenized.write_jsonl(tmp_path / "x.jsonl", [row]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("BoolQ", {"answer": "perhaps"}, "the answer 'perhaps' is none of true, false"),
        ("PIQA", {"label": 2}, "the answer 2 is none of 0, 1"),
        ("PIQA", {"sol1": " "}, "a choice is empty"),
        ("SIQA", {"label": "4"}, "the answer '4' is none of 1, 2, 3"),
        ("HellaSwag", {"endings": None}, "NoneType"),
        ("WinoGrande", {"sentence": "no blank"}, "no blank _"),
        ("ARC", {"answerKey": "E"}, "the answer 'E' is none of A, B"),
        ("ARC", {"choices": {"text": ["p"], "label": ["A", "B"]}}, "1 choices with 2 labels"),
        ("OpenBookQA", {"choices": {}}, "'text'"),
    ],
)
def test_a_row_that_is_not_in_the_form(tmp_path, name, change, message):
    good = HUB[name][0]
    with pytest.raises(
        ScaloraError, match=rf"x\.jsonl, line 2, row 2: not in the form of the {name} data \(.*{message}"
    ):
        load(tokenized.write_jsonl(tmp_path / "x.jsonl", [good, {**good, **change}]))


def test_likeness_of_names_is_no_form(tmp_path):
    row = {"question": "Who?", "passage": "It was Kai.", "answer": "Kai"}
    path = tokenized.write_jsonl(tmp_path / "x.jsonl", [row])
    assert load(path, ("question", "passage", "answer")) == [row]


# An instruction of LLM-Adapters' JSON for each set, its answer, and what becomes of it.
JSON = {
    "BoolQ": (
        "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
        "true",
        ("is it?", ["true", "false"], 0),
    ),
    "PIQA": (
        "Please choose the correct solution to the question: How?\n\nSolution1: a\n\nSolution2: b\n\n"
        "Answer format: solution1/solution2",
        "solution2",
        ("How?", ["a", "b"], 1),
    ),
    "SIQA": (
        "Please choose the correct answer to the question: Kai ran. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
        ("Kai ran. Why?", ["a", "b", "c"], 2),
    ),
    "HellaSwag": (
        "Please choose the correct ending to complete the given sentence: Roof: [header] How to mend [title] He\n\n"
        "Ending1: [step] starts. Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending1",
        ("Roof: How to mend. He", ["starts.", "b", "c", "d"], 0),
    ),
    "WinoGrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: S beat M, so _ won.\n\n"
        "Option1: S Option2: M Answer format: option1/option2",
        "option1",
        ("S beat M, so _ won.", ["S", "M"], 0),
    ),
    "ARC-e": (
        "Please choose the correct answer to the question: Why?\n\nAnswer1: a Answer2: b Answer3: c Answer4: d\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer4",
        ("Why?", ["a", "b", "c", "d"], 3),
    ),
    "ARC-c": (
        "Please choose the correct answer to the question: Why?\n\nAnswer1: a Answer2: b Answer3: c Answer4: d "
        "Answer5: e\n\nAnswer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
        ("Why?", ["a", "b", "c", "d", "e"], 4),
    ),
    "OBQA": (
        "Please choose the correct answer to the question: The sun\n\nAnswer1: a Answer2: b Answer3: c Answer4: d\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer2",
        ("The sun", ["a", "b", "c", "d"], 1),
    ),
}


def record(name):
    instruction, answer, _ = JSON[name]
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def write(path, rows):
    path.write_text(json.dumps(rows, indent=4))
    return path


@pytest.mark.parametrize("name", JSON)
def test_llm_adapters_json(tmp_path, name):
    row = load(write(tmp_path / "x.json", [record(name)]), (*PLAIN, "output"))[0]
    assert plain(row) == JSON[name][2]
    assert row["output"] == record(name)["output"]


def test_both_forms_of_winogrande_are_cut_at_the_blank(tmp_path):
    parts = ("before", "after")
    for path in (
        write(tmp_path / "x.json", [record("WinoGrande")]),
        tokenized.write_jsonl(tmp_path / "x.jsonl", [HUB["WinoGrande"][0]]),
    ):
        assert plain(load(path, parts)[0], parts) == ("S beat M, so ", "won.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "answer5"}, "the answer 'answer5' is none of answer1, answer2, answer3, answer4"),
        ({"answer": 2}, "the answer 2 is none of"),
        ({"instruction": "Why? Answer1: a Answer2: b\n\nAnswer format: answer1/answer2/answer3"}, "not all of answer1"),
        ({"instruction": "Why?"}, "does not end in 'Answer format:'"),
        ({"instruction": "Why? Answer1: a\n\nAnswer format: answer1"}, "two or more"),
        ({"instruction": None}, "NoneType"),
        ({"instruction": "Why? Answer1: Answer2: b Answer format: answer1/answer2"}, "a choice is empty"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_instruction(tmp_path, change, message, place):
    rows = [record("OBQA"), record("OBQA")]
    rows[place] |= change
    where = rf"x\.json, line {2 + 6 * place}, row {1 + place}: not in the form of the commonsense data \(.*{message}"
    with pytest.raises(ScaloraError, match=where):
        load(write(tmp_path / "x.json", rows))


def test_a_row_without_its_instruction(tmp_path):
    with pytest.raises(ScaloraError, match=r"line 8, row 2: not in the form of .*\('instruction'\)"):
        load(write(tmp_path / "x.json", [record("OBQA"), {"answer": "answer1"}]))


def test_other_instructions_are_left_alone(tmp_path):
    row = {"instruction": "Add 1 and 2.", "input": "", "output": "3", "answer": "3"}
    assert load(write(tmp_path / "x.json", [row]), tuple(row)) == [row]
    with pytest.raises(
        ScaloraError, match=r"no column 'question' in .*x\.json; it has instruction, input, output, answer"
    ):
        load(tmp_path / "x.json")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.99])
def test_json_that_is_cut_off(tmp_path, kept):
    path = write(tmp_path / "x.json", [record("OBQA"), record("PIQA")])
    text = path.read_text()
    cut = text[: int(len(text) * kept)]
    path.write_text(cut)
    with pytest.raises(ScaloraError, match=r"x\.json, line \d+: not valid JSON .*the file seems cut off; get it again"):
        load(path)


def test_lines_of_json_in_any_layout(tmp_path):
    path = tmp_path / "x.json"
    for text, line in (('[{"a": 1}, {"a": null}]', 1), ('\n[ {"a": "x"}\n,\n\n{"a":\nnull}]\n', 5)):
        path.write_text(text)
        with pytest.raises(ScaloraError, match=rf"column 'a' is null in .*x\.json, line {line}, row 2;"):
            load(path, ("a",))


def test_qqp_has_questions_of_two_lines(tmp_path):
    path = tmp_path / "train.tsv"
    head = "id\tquestion1\tquestion2\tis_duplicate\n"
    path.write_text(f'{head}1\ta "b\tc\t0\n2\t"Was he\n"\tWho?\t1\n3\te\tf\t0\n')
    rows = load(path, ("question1", "question2", "is_duplicate"))
    assert [tuple(row.values()) for row in rows] == [('a "b', "c", "0"), ('"Was he\n"', "Who?", "1"), ("e", "f", "0")]
    for short, line in (
        ('1\t"Was he\n2\te\tf\t0\n', 2),
        ("1\ta\tb\t0\n2\te\n3\te\tf\t0\n", 3),
        ('1\ta\tb\t0\n2\t"e', 3),
    ):
        path.write_text(head + short)
        reason = r"\d+ fields, but the first line has 4|a quote is never closed"
        with pytest.raises(ScaloraError, match=rf"train\.tsv, line {line}: ({reason})"):
            load(path, ("question1",))


def test_values_that_a_column_may_hold(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\na\tyes\n\nb\tye")
    with pytest.raises(ScaloraError, match=r"column 'label' is 'ye' in .*dev\.tsv, line 4, row 2; use \['yes', 'no'\]"):
        load(path, ("sentence", "label"), values={"label": ["yes", "no"]})
    assert len(load(path, ("sentence", "label"), values={"label": ["yes", "ye"]})) == 2
    hidden = tokenized.write_jsonl(tmp_path / "x.jsonl", [{"sentence": "a", "label": -1}])
    with pytest.raises(ScaloraError, match="the label is hidden: this split has no labels"):
        load(hidden, ("sentence", "label"), values={"label": [0, 1]})


def test_values_hold_for_a_column_that_rows_may_lack(tmp_path):
    path = tokenized.write_jsonl(tmp_path / "x.jsonl", [{"a": "1", "b": "x"}, {"a": "2"}, {"a": "3", "b": "z"}])
    spec = DataSpec(train=str(path), test=str(path), values={"b": ["x", "y"]})
    with pytest.raises(ScaloraError, match=r"column 'b' is 'z' in .*line 3, row 3; use \['x', 'y'\]"):
        load_splits(spec, ["a"], optional={"b": False})
    some = load_splits(spec.model_copy(update={"values": {"b": ["x", "z"]}}), ["a"], optional={"b": False})
    assert [row["b"] for row in some.test] == ["x", None, "z"]


def test_mathematics_gets_question_and_answer(tmp_path):
    meta = {
        "type": "GSM_Rephrased",
        "query": "1+1?",
        "original_question": "1+1",
        "response": "It is 2. The answer is: 2",
    }
    path = tokenized.write_jsonl(tmp_path / "meta.jsonl", [meta])
    assert load(path, ("question", "answer"))[0] == {"question": "1+1?", "answer": "It is 2. The answer is: 2"}
    problem = {"problem": "$1+1$?", "solution": r"It is $\boxed{2}$.", "answer": "2", "subject": "Algebra"}
    path = tokenized.write_jsonl(tmp_path / "math.jsonl", [problem])
    assert load(path, ("question", "answer"), form="published")[0]["answer"].endswith("$.\nThe answer is: 2")
