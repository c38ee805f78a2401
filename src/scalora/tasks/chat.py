"""Conversations: a model learns what the assistant says in them, each time from all that was said before."""

from __future__ import annotations

import math
from itertools import compress
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from ..common.errors import ScaloraError
from .completion import token_logprobs
from .conversations import Conversation, read_messages, read_tools
from .data.rows import PlacedRow
from .task import BaseTaskSpec, Prediction, Score, Split, Task, TokenDataset
from .template import Template
from .turns import ChatTemplate, Turns


class ChatSpec(BaseTaskSpec, frozen=True):
    """Learn the assistant's turns of `messages`, or of `completion` after `prompt`; each is a column."""

    kind: Literal["chat"] = "chat"
    messages: str | None = None
    """Lists of `role` and `content`, or of ShareGPT's `from` and `value`. Default: the column messages."""
    prompt: str | None = None
    """With `completion`: texts, of the user and the assistant, or lists of messages. Only the completion is learnt."""
    completion: str | None = None
    tools: str | None = None
    """A column with the tools of each row, JSON schemas in a list; a row may have none, but not all."""
    system: str | None = None
    """A template with {column} fields: the system message of conversations that have none."""
    chat_template: str | None = None
    """A template (Jinja) in place of the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the template reads besides messages and tools, e.g. {enable_thinking: false}."""
    max_length: int = Field(default=1024, ge=2)

    @model_validator(mode="after")
    def _possible(self) -> ChatSpec:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion belong together: give both, or messages")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("messages was given, and prompt with completion too: give one of the two")
        return self


class ChatTask(Task):
    """Loss and score are on what the assistant wrote, with the tokens that end its turns."""

    Spec = ChatSpec
    head = "causal-lm"
    spec: ChatSpec

    def __init__(self, spec: ChatSpec) -> None:
        super().__init__(spec)
        self.system = None if spec.system is None else Template("task.system", spec.system)
        self.conversations = (
            (spec.messages or "messages",) if spec.prompt is None or spec.completion is None
            else (spec.prompt, spec.completion)
        )  # fmt: skip

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.conversations, *(self.system.columns if self.system else ()))))

    @property
    def optional(self) -> dict[str, bool]:
        return {} if self.spec.tools is None else {self.spec.tools: True}

    def check(self, row: PlacedRow) -> None:
        if self.system:
            self.system.check(row, keep_missing=self.data.missing == "keep")
        self._conversation(row)

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        rows = [
            {"input_ids": ids, "labels": [token if own else -100 for token, own in zip(ids, learnt, strict=True)]}
            for ids, learnt in self._turns(tokenizer, split)
        ]
        return TokenDataset(rows, 0)

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """`nll`: minus the mean log-likelihood (nats) of a token of the assistant's, over all of them in the split.

        A prediction is of a conversation: its last turn that is learnt, and the mean probability (geometric) of all
        tokens that are.
        """
        turns = self._turns(tokenizer, split)
        starts = [learnt.index(True) for _, learnt in turns]
        pairs = [(ids[:start], ids[start:]) for (ids, _), start in zip(turns, starts, strict=True)]
        found = token_logprobs(model, tokenizer, pairs, batch_size=batch_size, autocast=autocast, progress=progress)
        own = [
            logprobs[torch.tensor(learnt[start:])].double()
            for logprobs, (_, learnt), start in zip(found, turns, starts, strict=True)
        ]
        predictions = [
            self._prediction(self._conversation(row), math.exp(logprobs.mean().item()))
            for row, logprobs in zip(self.rows(split), own, strict=True)
        ]
        return Score({"nll": -torch.cat(own).mean().item()}, "nll", predictions)

    def _prediction(self, conversation: Conversation, probability: float) -> Prediction:
        last = conversation.learnt[-1]
        said = "\n".join(f"{each['role']}: {each['content']}" for each in conversation.messages[:last])
        return Prediction(said, conversation.messages[last]["content"], None, probability)

    def _turns(self, tokenizer: Any, split: Split) -> list[Turns]:
        """The tokens of every conversation up to the last that is learnt."""
        template = ChatTemplate(tokenizer, self.spec.chat_template, self.spec.chat_template_kwargs)
        read = self.read_rows(split, lambda row: template.read(self._conversation(row), row.place))
        ends = [max(compress(range(len(ids)), learnt)) + 1 for ids, learnt in read]
        ended = [Turns(ids[:end], learnt[:end]) for (ids, learnt), end in zip(read, ends, strict=True)]
        if template.dated:
            self.tell(
                "task: the chat template writes today's date, so that this run cannot be resumed or repeated on "
                "another day: set date_string in task.chat_template_kwargs, if the template reads it"
            )
        if not template.stops(ended[0]):
            self.tell(
                "task: the chat template ends the assistant's turns with no token of their own, so that the model does "
                "not learn when to stop"
            )
        return [ended[number] for number in self.fitting(split, ends, self.spec.max_length)]

    def _conversation(self, row: PlacedRow) -> Conversation:
        fields = ("messages",) if self.spec.prompt is None else ("prompt", "completion")
        roles = (None,) if self.spec.prompt is None else ("user", "assistant")
        parts = [
            read_messages(row[column], f"task.{field}", row.place, role)
            for column, field, role in zip(self.conversations, fields, roles, strict=True)
        ]
        messages = [message for part in parts for message in part]
        given = len(messages) - len(parts[-1])
        if self.system and not any(message["role"] in ("system", "developer") for message in messages):
            messages, given = [{"role": "system", "content": self.system(row)}, *messages], given + (given > 0)
        tools = None if self.spec.tools is None else read_tools(row.get(self.spec.tools), "task.tools", row.place)
        conversation = Conversation(messages, given, tools)
        if not conversation.learnt:
            raise ScaloraError(f"task.{fields[-1]}: no message is the assistant's in {row.place}; mend or drop the row")
        return conversation


TASKS = (ChatTask,)
