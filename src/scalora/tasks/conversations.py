"""Conversations as data sets have them: messages with roles, ShareGPT's turns, or a prompt and a completion."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ..common.errors import ScaloraError
from .data.values import flaw, shown

Message = dict[str, Any]
"""`role` and `content`, and whatever else the chat template reads, as `tool_calls`."""

_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "function_response": "tool", "tool": "tool",
}  # fmt: skip
"""Who speaks in ShareGPT's form, and which role that is."""


class Conversation(NamedTuple):
    """Messages, of which the assistant's from number `given` on are learnt, and the tools that it may call."""

    messages: list[Message]
    given: int = 0
    tools: list[Any] | None = None

    @property
    def learnt(self) -> list[int]:
        """The numbers of the messages that are learnt."""
        return [i for i in range(self.given, len(self.messages)) if self.messages[i]["role"] == "assistant"]


def read_messages(value: Any, field: str, place: str, role: str | None = None) -> list[Message]:
    """The messages of one cell, in the form that chat templates take.

    Args:
        value: a list of `role` and `content`, or of ShareGPT's `from` and `value`; one such list as JSON.
        field: the recipe's name of the column, for messages.
        place: the row's, for messages.
        role: who says a plain text; None where there may be none.

    Raises:
        ScaloraError: the value is no conversation.
    """
    if role is not None and isinstance(value, str) and not flaw(value):
        return [{"role": role, "content": value}]
    listed = from_json(value) if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        wanted = "a list of messages" if role is None else "a text or a list of messages"
        raise ScaloraError(f"{field}: {shown(value)} is not {wanted} in {place}; mend or drop the row")
    return [_message(each, f"{field}: message {number}", place) for number, each in enumerate(listed, 1)]


def read_tools(value: Any, field: str, place: str) -> list[Any] | None:
    """The tools that a row offers, JSON schemas in a list or as JSON; None where it offers none."""
    listed = (from_json(value) if isinstance(value, str) else value) or None
    if listed is not None and not (isinstance(listed, list) and all(isinstance(each, dict) for each in listed)):
        raise ScaloraError(f"{field}: {shown(value)} is not a list of tools in {place}; mend or drop the row")
    return listed or None


def _message(value: dict[str, Any], where: str, place: str) -> Message:
    found = {name: each for name, each in value.items() if each is not None}
    if "from" in found and "role" not in found:
        found = _shared(found, where, place)
    role, content = found.get("role"), found.get("content")
    if not isinstance(role, str) or not role.strip():
        raise ScaloraError(f"{where} {shown(value)} has no role in {place}; mend or drop the row")
    if isinstance(content, list):
        content = found["content"] = _joined(content, where, place)
    if content is None and (found.get("tool_calls") or found.get("reasoning_content")):
        content = found["content"] = ""
    if not isinstance(content, str) or flaw(content):
        reason = "has no content" if content is None else f"has a content that {flaw(content) or 'is no text'}"
        raise ScaloraError(f"{where} ({role}) {reason} in {place}; mend or drop the row")
    if not content.strip() and len(found) == 2 and role == "assistant":
        raise ScaloraError(f"{where} ({role}) is empty in {place}; mend or drop the row")
    return found


def _shared(turn: dict[str, Any], where: str, place: str) -> Message:
    """A turn of ShareGPT's form; a `function_call` holds the call as JSON."""
    speaker, text = turn["from"], turn.get("value")
    if speaker not in _SPEAKERS:
        raise ScaloraError(
            f"{where} is from {shown(speaker)} in {place}; use {', '.join(_SPEAKERS)}, or messages with role and "
            "content"
        )
    if speaker != "function_call":
        return {"role": _SPEAKERS[speaker], "content": text}
    call = from_json(text) if isinstance(text, str) else text
    calls = call if isinstance(call, list) else [call]
    if not calls or not all(isinstance(each, dict) and "name" in each for each in calls):
        raise ScaloraError(f"{where} is no named function call, but {shown(text)} in {place}; mend or drop the row")
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": each} for each in calls],
    }


def _joined(parts: list[Any], where: str, place: str) -> str:
    """A content in parts, as one text."""
    found = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise ScaloraError(f"{where} holds what is no text, {shown(parts)}, in {place}; only texts can be trained on")
    return "".join(texts)


def from_json(text: str) -> Any:
    """The value that a text is as JSON, or else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
