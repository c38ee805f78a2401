"""A task of every kind that reads rows, on rows that are good but for those that a test puts among them."""

from __future__ import annotations

from helpers import tokenized
from scalora.tasks import build_task, task_class

CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
GOOD = {
    "a": "the cat", "b": "sat on", "choices": ["red", "blue"], "label": "yes", "messages": CHAT, "numbers": [0.5, 1.0],
    "other": "ran", "image": "there.png", "tokens": ["the", "cat"], "tags": ["O", "B-PET"],
}  # fmt: skip
KINDS = {
    "chat": ({}, {"messages": CHAT[:1]}),
    "classification": ({"text": "a", "label": "label"}, {"label": None}),
    "completion": ({"prompt": "{a}", "completion": " {b}"}, {"b": ""}),
    "image_classification": ({}, {"image": "none.png"}),
    "multiple_choice": ({"prompt": "{a}", "answer": "b"}, {"choices": ["red"]}),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "other"}, {"other": "sat on"}),
    "seq2seq": ({"input": "a", "target": "b"}, {"b": ""}),
    "text": ({"text": "a"}, {"a": 3.0e400}),
    "token_classification": ({}, {"tags": ["O"]}),
    "vectors": ({"features": "numbers", "label": "label"}, {"numbers": "none"}),
}


def rows(kind, *special):
    """Nine good rows that differ, and the special ones after the fourth."""
    answer = {"b": "red"} if kind == "multiple_choice" else {}
    good = [{**GOOD, "a": f"the cat {'abcdefghi'[i]}", "label": i % 2, **answer, "id": i} for i in range(9)]
    return [*good[:4], *({**good[0], **each} for each in special), *good[4:]]


def task(folder, kind, content, data=None, **fields):
    path = tokenized.write_jsonl(folder / "rows.jsonl", content)
    data = {"train": path, "test": path, "folder": str(folder), "columns": {"id": "id"}, **(data or {})}
    return build_task(task_class(kind).Spec(data=data, **KINDS[kind][0], **fields))
