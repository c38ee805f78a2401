"""Rows of published data sets as the hub has them, and what is read of a file of such rows."""

from scalora.tasks.data.rows import DataSpec, load_splits

PLAIN = ("question", "choices", "answer")

# Rows as datasets.load_dataset gives them, and what becomes of each.
HUB = {
    "BoolQ": (
        {"question": "is it hot", "answer": False, "passage": "Ice is cold."},
        ("is it hot", ["true", "false"], 1),
    ),
    "PIQA": (
        {"goal": "boil eggs", "sol1": "in water", "sol2": "in air", "label": 0},
        ("boil eggs", ["in water", "in air"], 0),
    ),
    "SIQA": (
        {"context": "Kai ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        ("Kai ran. Why?", ["a", "b", "c"], 2),
    ),
    "HellaSwag": (
        {
            "ind": 4,
            "activity_label": "Roof",
            "ctx_a": "[header] How to mend [title] A man sits.",
            "ctx_b": "he",
            "ctx": "A man sits. he",
            "endings": ["[step] starts.", "stops."],
            "label": "1",
        },
        ("Roof: How to mend. A man sits. He", ["starts.", "stops."], 1),
    ),
    "WinoGrande": (
        {"sentence": "S beat M, so _ won.", "option1": "S", "option2": "M", "answer": "1"},
        ("S beat M, so _ won.", ["S", "M"], 0),
    ),
    "ARC": (
        {"id": "x", "question": "Why?", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "B"},
        ("Why?", ["p", "q"], 1),
    ),
    "ARC with digits": (
        {"id": "x", "question": "Why?", "choices": {"text": ["p", "q"], "label": ["1", "2"]}, "answerKey": "1"},
        ("Why?", ["p", "q"], 0),
    ),
    "OpenBookQA": (
        {"id": "x", "question_stem": "The sun", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "A"},
        ("The sun", ["p", "q"], 0),
    ),
}


def load(path, required=PLAIN, **fields):
    return load_splits(DataSpec(train=str(path), test=str(path), **fields), required).test
