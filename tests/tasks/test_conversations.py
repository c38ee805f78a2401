import json

import pytest

from helpers.chats import said
from scalora.common.errors import ScaloraError
from scalora.tasks.conversations import Conversation, read_messages, read_tools

CALL = {"name": "look", "arguments": {"where": 12}}
WANTED = said(("system", "be good"), ("user", "hello"), ("assistant", "yes"))


def read(value, role=None):
    return read_messages(value, "task.messages", "rows, row 1", role)


@pytest.mark.parametrize(
    "value",
    [
        WANTED,
        json.dumps(WANTED),
        [{**message, "name": None} for message in WANTED],
        [{"from": who, "value": m["content"]} for who, m in zip(("system", "human", "gpt"), WANTED, strict=True)],
        [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in WANTED],
    ],
)  # fmt: skip
def test_every_form_gives_the_same_messages(value):
    assert read(value) == WANTED


def test_plain_texts_are_of_whom_they_are_said_to_be():
    assert read("hello", "user") == said(("user", "hello"))
    assert read(WANTED[:2], "user") == WANTED[:2]


def test_tool_calls_stay_as_they_are():
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "name": "look", "tool_call_id": "1", "content": "123"},
    ]
    assert read(turns) == [{**turns[0], "content": ""}, turns[1]]
    shared = [{"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "123"}]
    assert read(shared) == [{**turns[0], "content": ""}, {"role": "tool", "content": "123"}]


@pytest.mark.parametrize("value", [None, "", [], "[]"])
def test_a_row_may_have_no_tools(value):
    assert read_tools(value, "task.tools", "rows, row 1") is None


def test_tools_may_be_json():
    assert read_tools(json.dumps([CALL]), "task.tools", "rows, row 1") == [CALL]
    assert read_tools([CALL], "task.tools", "rows, row 1") == [CALL]
    with pytest.raises(ScaloraError, match=r"task\.tools: 'look' is not a list of tools in rows, row 1"):
        read_tools("look", "task.tools", "rows, row 1")


def test_what_is_learnt_is_the_assistants_after_what_is_given():
    messages = [*WANTED, *said(("assistant", "no"), ("user", "a"), ("assistant", "b"))]
    assert Conversation(messages).learnt == [2, 3, 5]
    assert Conversation(messages, given=3).learnt == [3, 5]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("hello", "'hello' is not a list of messages in rows, row 1"),
        ([["user", "a"]], "is not a list of messages"),
        ([{"content": "a"}], "message 1 .* has no role in rows, row 1"),
        ([*WANTED, {"role": "user"}], r"message 4 \(user\) has no content"),
        ([{"role": "user", "content": 3}], "has a content that is no text"),
        ([{"role": "user", "content": "a\0"}], "NUL"),
        ([{"role": "assistant", "content": " "}], r"message 1 \(assistant\) is empty"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "holds what is no text"),
        ([{"from": "me", "value": "a"}], "message 1 is from 'me' in rows, row 1; use human"),
        ([{"from": "function_call", "value": "look"}], "is no named function call"),
    ],
)
def test_mistakes(value, words):
    with pytest.raises(ScaloraError, match=f"task.messages: .*{words}"):
        read(value)
