"""Published forms of data sets, recognised by their columns and turned into plain rows.

Every commonsense set gets the columns `question`, `choices` (texts) and `answer` (the right one's index), whether it
comes from the hub or in the JSON of LLM-Adapters (github AGI-Edgerunners/LLM-Adapters); its own columns stay beside
them. What an instruction of that JSON runs together, or leaves out, cannot be had back: SIQA's context and HellaSwag's
activity are part of the question (so they are in rows from the hub, that both read the same), and BoolQ has no passage.

MetaMathQA and MATH get `question` and `answer`, the solution with its result at the end, as GSM8K has them.

A file may look like a published set and be none. So its rows stay as they are unless the recipe asks for plain columns
that the file lacks. A text of the file's own that the recipe asks for is not replaced unless that is asked for by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ...common import packaged
from ...common.errors import ScaloraError
from .values import shown

Row = dict[str, Any]


_SUPPLIED = {"question", "choices", "answer", "before", "after"}
"""The plain columns that forms may have."""


def adapt(
    source: str, rows: list[Row], where: Callable[[int], str], asked: Collection[str], *, published: bool = False
) -> list[Row]:
    """Plain columns for rows in a published form, where the recipe asks for some that the file lacks; else the rows.

    Args:
        source: the file, hub id or alias of a packaged set, which always is in its form.
        rows: as they were read.
        where: the place of a row, by its number from 1, for messages.
        asked: the columns that the recipe asks for.
        published: take the form's columns in any case, the file's own of the same name notwithstanding.

    Raises:
        ScaloraError: a row is not in the form of the others, its label is hidden, or a text that the recipe asks for
            would be replaced.
    """
    own = set().union(*rows)
    form = _form_of(source, rows)
    if form is None or not (published or source in packaged.ASSETS or (set(asked) - own) & _SUPPLIED):
        return rows
    name, adapter = form
    adapted = []
    for number, row in enumerate(rows, 1):
        try:
            adapted.append(adapter(row))
        except _HiddenLabel as error:
            raise ScaloraError(
                f"{where(number)}: the label is hidden ({error}): this split has no labels; take another, as train or "
                "validation"
            ) from error
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ScaloraError(
                f"{where(number)}: not in the form of the {name} data ({error!s:.200}): {shown(row, 500)}"
            ) from error
    if not published and source not in packaged.ASSETS:
        _refuse_replaced(name, rows, adapted, where, asked, own)
    return adapted


def _refuse_replaced(
    name: str, rows: list[Row], adapted: list[Row], where: Callable[[int], str], asked: Collection[str], own: set[str]
) -> None:
    """Raise ScaloraError where a text or label that the recipe asks for would be another, by the form of that name."""
    kept = own & set(asked)
    if "choices" in asked and ("choices" not in own or any(isinstance(row.get("choices"), dict) for row in rows)):
        kept -= {"choices", "answer"}  # an answer among choices that the file lacks has no other meaning
    for number, (row, plain) in enumerate(zip(rows, adapted, strict=True), 1):
        for column in sorted(kept & row.keys()):
            if _text(row[column]) != _text(plain[column]):
                raise ScaloraError(
                    f"{where(number)}: the file has a column {column!r} of its own, {shown(row[column])}, and seems to "
                    f"be the {name} data, in whose form that is {shown(plain[column])}: to take the form set "
                    "task.data.form: published; to take the file's own ask for none that it lacks "
                    f"({', '.join(sorted(set(asked) - own))}); it has {', '.join(row)}"
                )


def _text(value: Any) -> str:
    return str(value).strip()


def _form_of(source: str, rows: list[Row]) -> tuple[str, Callable[[Row], Row]] | None:
    if source in packaged.ASSETS:
        packed = {"sarcasm": _sarcasm, "socialiqa": _socialiqa, "wikipedia": _wikipedia}
        return (source, packed[source]) if source in packed else None
    first = rows[0]
    # Any row, not the first: a file whose first row is damaged is still of this form. Other data have such columns too.
    if {"instruction", "answer"} <= set(first) <= {"instruction", "input", "output", "answer"} and any(
        isinstance(row.get("instruction"), str) and "Answer format:" in row["instruction"] for row in rows
    ):
        return "commonsense", _commonsense
    for name, (columns, adapter) in _HUB_FORMS.items():
        if all(column in first and isinstance(first[column], kind) for column, kind in columns.items()):
            return name, adapter
    return None


class _HiddenLabel(Exception):
    """The row is of a test set whose labels are not published."""


def _index(answer: Any, names: Sequence[str]) -> int:
    text = str(answer).strip()
    if answer is None or text in ("", "-1"):
        raise _HiddenLabel(repr(answer))
    if text not in names:
        raise ValueError(f"the answer {answer!r} is none of {', '.join(names)}")
    return list(names).index(text)


def _plain(row: Row, question: str, choices: Sequence[str], answer: int) -> Row:
    question, choices = question.strip(), [choice.strip() for choice in choices]
    if "" in choices:
        raise ValueError("a choice is empty")
    return {**row, "question": question, "choices": choices, "answer": answer}


def _sarcasm(row: Row) -> Row:
    return {"headline": row["input"][1]["content"], "label": int(row["ideal"])}


def _socialiqa(row: Row) -> Row:
    question, *choices = re.split(r"\s*\bA: |; B: |; C: ", row["input"][0]["content"].removesuffix("."))
    if len(choices) != 3:
        raise ValueError(f"{len(choices)} choices")
    return {"question": question, "choices": choices, "answer": "ABC".index(row["ideal"])}


def _wikipedia(row: Row) -> Row:
    """The paragraph as it was written; beside it are its sentences in other orders."""
    return {"text": row["0"].strip()}


def _commonsense(row: Row) -> Row:
    """LLM-Adapters: the instruction holds the question, the choices and, after "Answer format:", the answers' names."""
    body, _, answer_format = row["instruction"].rpartition("Answer format:")
    names = answer_format.strip().split("/")
    if not body or len(names) < 2:
        raise ValueError("the instruction does not end in 'Answer format:' and the names of two or more answers")
    question = re.sub(r"^Please (choose|answer)[^:]*:\s*", "", body.strip())
    choices = names
    if names != ["true", "false"]:
        pattern = "(.*?)" + "".join(rf"\s*\b{re.escape(name.capitalize())}:(.*?)" for name in names)
        found = re.fullmatch(pattern, question, re.DOTALL)
        if not found:
            raise ValueError(f"not all of {', '.join(names)} follow the question")
        question, *choices = found.groups()
    if names[0] == "ending1":
        question, choices = _without_brackets(question), [_without_brackets(choice) for choice in choices]
    plain = _plain(row, question, choices, _index(row["answer"], names))
    return _around_blank(plain) if names[0] == "option1" else plain


def _boolq(row: Row) -> Row:
    return _plain(row, row["question"], ["true", "false"], _index(str(row["answer"]).lower(), ["true", "false"]))


def _piqa(row: Row) -> Row:
    return _plain(row, row["goal"], [row["sol1"], row["sol2"]], _index(row["label"], ["0", "1"]))


def _siqa(row: Row) -> Row:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _plain(row, f"{row['context']} {row['question']}", choices, _index(row["label"], ["1", "2", "3"]))


def _hellaswag(row: Row) -> Row:
    # As lm-evaluation-harness writes it: the second half of the context begins with a capital.
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_b" in row else row["ctx"]
    endings = [_without_brackets(ending) for ending in row["endings"]]
    answer = _index(row["label"], [str(i) for i in range(len(endings))])
    return _plain(row, _without_brackets(f"{row['activity_label']}: {context}"), endings, answer)


def _winogrande(row: Row) -> Row:
    answer = _index(row["answer"], ["1", "2"])
    return _around_blank(_plain(row, row["sentence"], [row["option1"], row["option2"]], answer))


def _arc(row: Row) -> Row:
    """The choices' labels are letters, or digits in some rows."""
    question = row["question_stem"] if "question_stem" in row else row["question"]
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} choices with {len(labels)} labels")
    return _plain(row, question, texts, _index(row["answerKey"], labels))


def _metamath(row: Row) -> Row:
    return {**row, "question": row["query"], "answer": row["response"]}


def _math(row: Row) -> Row:
    """The solution ends as MetaMathQA's do, so that answers are found in both alike."""
    return {**row, "question": row["problem"], "answer": f"{row['solution']}\nThe answer is: {row['answer']}"}


_HUB_FORMS: dict[str, tuple[dict[str, type], Callable[[Row], Row]]] = {
    "BoolQ": ({"question": str, "passage": str, "answer": bool}, _boolq),
    "PIQA": ({"goal": str, "sol1": str, "sol2": str, "label": object}, _piqa),
    "SIQA": (
        {"context": str, "question": str, "answerA": str, "answerB": str, "answerC": str, "label": object},
        _siqa,
    ),
    "HellaSwag": ({"activity_label": str, "ctx": str, "endings": list, "label": object}, _hellaswag),
    "WinoGrande": ({"sentence": str, "option1": str, "option2": str, "answer": object}, _winogrande),
    "ARC": ({"question": str, "choices": dict, "answerKey": object}, _arc),
    "OpenBookQA": ({"question_stem": str, "choices": dict, "answerKey": object}, _arc),
    "MetaMathQA": ({"query": str, "response": str, "type": str}, _metamath),
    "MATH": ({"problem": str, "solution": str, "answer": str}, _math),
}
"""Name -> the columns, with their types, that tell a set from others, and what makes plain rows of its rows."""


def _without_brackets(text: str) -> str:
    """HellaSwag's text without the marks that its WikiHow half is full of, as lm-evaluation-harness cleans it."""
    cleaned = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    return cleaned if cleaned.strip() else text


def _around_blank(row: Row) -> Row:
    """WinoGrande's sentence in two, `before` and `after` the blank, for scoring what comes after it."""
    before, blank, after = row["question"].partition("_")
    if not blank or not after.strip():
        raise ValueError("the sentence has no blank _ with text after it")
    return {**row, "before": before, "after": after.strip()}
