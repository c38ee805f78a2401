"""Preferences: of two answers to a prompt a model learns to like one more than the other, by DPO (2305.18290).

Each answer is compared with what the base model thought of it. That reference is measured once, on the untouched base,
before any adapter is there: so no method and no event can move it, not even one that writes to the base weights. With
plain adapters it is what TRL computes with the adapter switched off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, takewhile
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from ..common.errors import ScaloraError
from .conversations import Conversation, Message, from_json, read_messages
from .data.rows import PlacedRow
from .data.values import flaw, is_missing, shown
from .encoding import encode
from .examples import Collator, TokenDataset
from .pairs import PairCollator, PairDataset, answer_logprobs, learn_from_pairs, pair_side
from .scoring import batches, by_row, evaluating
from .task import BaseTaskSpec, Prediction, Score, Split, Task
from .turns import ChatTemplate, Turns


class PreferenceSpec(BaseTaskSpec, frozen=True):
    """Like `chosen` more than `rejected` after `prompt`; each is a column of texts or of messages."""

    kind: Literal["preference"] = "preference"
    prompt: str = "prompt"
    """May be missing where `chosen` and `rejected` are whole conversations, which begin alike."""
    chosen: str = "chosen"
    rejected: str = "rejected"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """How much a nat counts: what a model gains by leaving the reference."""
    metric: Literal["reward_accuracy", "margin"] = "reward_accuracy"
    chat_template: str | None = None
    """A template (Jinja) in place of the tokenizer's own, for messages."""
    max_length: int = Field(default=1024, ge=2)


class PreferenceTask(Task):
    """DPO's sigmoid loss, -log σ(β·(gain(chosen) - gain(rejected))), a gain being log p less that of the base model."""

    Spec = PreferenceSpec
    head = "causal-lm"
    compares = True
    spec: PreferenceSpec

    def __init__(self, spec: PreferenceSpec) -> None:
        super().__init__(spec)
        self.references: dict[Split, list[float]] = {}
        """Of each split the base model's log-probabilities, in nats: chosen and rejected of each row in turn."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.spec.chosen, self.spec.rejected)

    @property
    def optional(self) -> dict[str, bool]:
        asked = self.spec.prompt != type(self.spec).model_fields["prompt"].default
        return {self.spec.prompt: asked}

    def check(self, row: PlacedRow) -> None:
        self._answers(row)

    def collator(self, tokenizer: Any, model: Any = None) -> Any:
        return PairCollator(Collator(tokenizer.pad_token_id))

    def train_dataset(self, tokenizer: Any, split: Split = "train") -> TokenDataset:
        return PairDataset(self._pairs(tokenizer, split), self.references.get(split))

    def refer(
        self, model: Any, tokenizer: Any, datasets: Mapping[Split, TokenDataset], batch_size: int,
        autocast: torch.dtype | None,
    ) -> None:  # fmt: skip
        for module in model.modules():  # as TRL does: what is random in the model is no preference
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for split, dataset in datasets.items():
            pairs = self._pairs(tokenizer, split)
            turns = list(chain.from_iterable(pairs))
            self.references[split] = self._logprobs(model, tokenizer, turns, batch_size, autocast, None)
            dataset.examples[:] = PairDataset(pairs, self.references[split]).examples

    def equip(self, model: Any) -> None:
        learn_from_pairs(model.get_base_model() if hasattr(model, "get_base_model") else model, self.spec.beta)

    def score(self, model, tokenizer, split="test", *, batch_size=32, autocast=None, progress=None) -> Score:
        """Of the rewards β·(log p - log p₀): `reward_accuracy`, the share of rows whose chosen answer has the larger
        one; `margin`, by how much on average; and `loss`, DPO's own.

        Before training all margins are 0, and so is the accuracy.
        """
        pairs = self._pairs(tokenizer, split)
        if split not in self.references:
            raise ScaloraError("task: the base model has not been measured (Task.refer), so there is no reference")
        turns = list(chain.from_iterable(pairs))
        found = torch.tensor(self._logprobs(model, tokenizer, turns, batch_size, autocast, progress)).double()
        gains = (found - torch.tensor(self.references[split]).double()).view(-1, 2)
        margins = self.spec.beta * (gains[:, 0] - gains[:, 1])
        metrics = {
            "reward_accuracy": (margins > 0).double().mean().item(),
            "margin": margins.mean().item(),
            "loss": -functional.logsigmoid(margins).mean().item(),
        }
        names = ("rejected", "chosen")
        predictions = [
            Prediction(self._shown(row), "chosen", names[margin > 0], max(chance, 1 - chance))
            for row, margin, chance in zip(self.rows(split), margins.tolist(), margins.sigmoid().tolist(), strict=True)
        ]
        return Score(metrics, self.spec.metric, predictions)

    def _logprobs(
        self, model: Any, tokenizer: Any, turns: Sequence[Turns], batch_size: int, autocast: torch.dtype | None,
        progress: Any,
    ) -> list[float]:  # fmt: skip
        """The log-probability of each answer as a whole, in nats."""
        collate, lengths = Collator(tokenizer.pad_token_id), [len(turn.ids) for turn in turns]
        with evaluating(model, autocast) as device:

            def read(batch: list[int]) -> list[float]:
                inputs = {k: v.to(device) for k, v in collate([pair_side(turns[i]) for i in batch]).items()}
                labels = inputs.pop("labels")
                return answer_logprobs(model(**inputs).logits, labels).tolist()

            return by_row(list(batches(lengths, lengths, batch_size)), read, progress)

    def _pairs(self, tokenizer: Any, split: Split) -> list[tuple[Turns, Turns]]:
        """The tokens of the chosen and of the rejected answer of every row that fits, after its prompt."""
        pairs = self.read_rows(split, lambda row: self._read(tokenizer, row))
        needed = [max(len(turns.ids) for turns in pair) for pair in pairs]
        return [pairs[number] for number in self.fitting(split, needed, self.spec.max_length)]

    def _read(self, tokenizer: Any, row: PlacedRow) -> tuple[Turns, Turns]:
        answers = self._answers(row)
        if isinstance(answers[0], Conversation):
            template = ChatTemplate(tokenizer, self.spec.chat_template)
            chosen, rejected = (_ended(template.read(each, row.place)) for each in answers)
        else:
            if tokenizer.eos_token_id is None:
                raise ScaloraError("task.kind is 'preference', but the tokenizer has no eos token to end answers with")
            read = encode(tokenizer, answers, [row, row])
            chosen, rejected = (
                Turns([*prompt, *answer, tokenizer.eos_token_id], [False] * len(prompt) + [True] * (len(answer) + 1))
                for prompt, answer in read
            )
        if chosen == rejected:
            raise ScaloraError(f"task: chosen and rejected are the same tokens in {row.place}; mend or drop the row")
        return chosen, rejected

    def _answers(self, row: PlacedRow) -> list[Any]:
        """Chosen and rejected, each as a text after the prompt's, or as a conversation of which the end is learnt."""
        given, found = row.get(self.spec.prompt), [row[column] for column in self.columns]
        texts: list[str] = [each for each in (given, *found) if isinstance(each, str) and not _is_list(each)]
        if len(texts) == 3:
            for field, value in zip(("prompt", "chosen", "rejected"), texts, strict=True):
                missing = field != "prompt" and self.data.missing == "refuse" and is_missing(value)
                if reason := flaw(value) or (f"is {shown(value)}" if missing else ""):
                    raise ScaloraError(f"task.{field}: the text {reason} in {row.place}; mend or drop the row")
            answers: list[Any] = [(given, each) for each in found]
        else:
            answers = self._conversations(given, found, row.place)
        if answers[0] == answers[1]:
            raise ScaloraError(f"task: chosen and rejected say the same in {row.place}; mend or drop the row")
        return answers

    def _conversations(self, given: Any, found: list[Any], place: str) -> list[Conversation]:
        said = [
            read_messages(each, f"task.{field}", place, "assistant")
            for each, field in zip(found, ("chosen", "rejected"), strict=True)
        ]
        before: list[Message] = []
        if all(messages and messages[0]["role"] == "assistant" for messages in said):
            if given is None:
                raise ScaloraError(f"task.prompt: there is no column {self.spec.prompt!r} in {place}; fill or drop it")
            before = read_messages(given, "task.prompt", place, "user")
        whole = [[*before, *messages] for messages in said]
        alike = len([0 for _ in takewhile(lambda each: each[0] == each[1], zip(*whole, strict=False))])
        conversations = [Conversation(messages, max(alike, len(before))) for messages in whole]
        for field, each in zip(("chosen", "rejected"), conversations, strict=True):
            if not each.learnt:
                raise ScaloraError(f"task.{field}: no answer is the assistant's alone in {place}; mend or drop the row")
        return conversations

    def _shown(self, row: PlacedRow) -> str:
        answer = self._answers(row)[0]
        if not isinstance(answer, Conversation):
            return answer[0]
        return "\n".join(f"{each['role']}: {each['content']}" for each in answer.messages[: answer.given])


def _ended(turns: Turns) -> Turns:
    """Up to the last token that is learnt."""
    end = max(place for place, own in enumerate(turns.learnt, 1) if own)
    return Turns(turns.ids[:end], turns.learnt[:end])


def _is_list(text: str) -> bool:
    """Whether a text is messages, as JSON."""
    return isinstance(from_json(text), list)


TASKS = (PreferenceTask,)
