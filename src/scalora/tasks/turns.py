"""From conversations to token ids, by the model's own chat template, and which of them the assistant wrote."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from ..common.errors import ScaloraError
from .conversations import Conversation
from .data.values import shown

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Turns(NamedTuple):
    """The token ids of a conversation, as many booleans that say which the assistant wrote and the model learns."""

    ids: list[int]
    learnt: list[bool]


class ChatTemplate:
    """A tokenizer's chat template, or another one, as what makes token ids of conversations.

    A template with `{% generation %}` says itself what the assistant writes. In any other a turn of the assistant
    begins where the generation prompt after the messages before it ends, and ends where a conversation does that ends
    with this turn. So the model learns what it is asked for when it chats, the token that ends a turn included. That
    holds only if the conversation begins with those shorter ones, letter by letter: where it does not, it is refused.

    Args:
        tokenizer: a fast one of transformers.
        template: in place of the tokenizer's own.
        options: what else the template reads, as `enable_thinking`.

    Raises:
        ScaloraError: there is no chat template, the tokenizer cannot tell where its tokens stand, or an option is none
            of the template's.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ScaloraError(
                "task: the rows are messages, but the model's tokenizer has no chat template: choose an "
                "instruction-tuned model, or give a template (Jinja) in task.chat_template"
            )
        if not tokenizer.is_fast:
            raise ScaloraError(
                f"task: the rows are messages, but {type(tokenizer).__name__} does not say where its tokens stand in "
                "a text: choose a model with a fast tokenizer (tokenizer.json)"
            )
        ours = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"documents"}
        if own := ours & (options or {}).keys():
            raise ScaloraError(f"task.chat_template_kwargs: {min(own)!r} is decided by the task; leave it out")
        self.tokenizer, self.template, self.options = tokenizer, template, dict(options or {})

    @property
    def dated(self) -> bool:
        """Whether what it writes depends on the day."""
        written = str(self.template or self.tokenizer.chat_template)
        return "strftime_now" in written and "date_string" not in self.options

    def read(self, conversation: Conversation, place: str) -> Turns:
        """The tokens of a conversation that has turns to be learnt; messages name its place.

        Raises:
            ScaloraError: the template refuses the conversation, writes earlier turns otherwise once others follow, or
                leaves nothing of what is learnt.
        """
        text = self._write(conversation, len(conversation.messages), place)
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = _whole(read["offset_mapping"])
        template = self._try(self.tokenizer.get_chat_template, place, self.template, conversation.tools)
        if _MARKS.search(template):
            turns = self._marked(conversation, template, place)
            if conversation.given:
                given = self._begins(conversation, conversation.given, text, place)
                turns = [(max(begin, given), end) for begin, end in turns if end > given]
        else:
            turns = [
                (self._begins(conversation, number, text, place), self._ends(conversation, number, text, place))
                for number in conversation.learnt
            ]
        learnt = [any(last > begin and first < end for begin, end in turns) for first, last in spans]
        learnt[:1] = [False]  # it has nothing before it to be predicted from
        if not any(learnt):
            raise ScaloraError(f"task: the chat template writes nothing of the assistant's in {place}; drop the row")
        return Turns(list(read["input_ids"]), learnt)

    def _marked(self, conversation: Conversation, template: str, place: str) -> list[tuple[int, int]]:
        """Where the template says that the assistant's turns stand.

        From its characters and not, as `return_assistant_tokens_mask`, from single tokens: a character that is many
        tokens, or none, would be taken for the wrong ones.
        """
        _, found = self._try(
            render_jinja_template, place, [conversation.messages], tools=conversation.tools, chat_template=template,
            return_assistant_tokens_mask=True, **{**self.tokenizer.special_tokens_map, **self.options},
        )  # fmt: skip
        return found[0]

    def stops(self, turns: Turns) -> bool:
        """Whether the last turn that is learnt ends, but for white space, with a token that is no text."""
        own = [token for token, learnt in zip(*turns, strict=True) if learnt]
        last = next((token for token in reversed(own) if self.tokenizer.decode([token]).strip()), None)
        return last in {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}

    def _begins(self, conversation: Conversation, number: int, text: str, place: str) -> int:
        """Where message `number` begins: after the generation prompt that follows those before it."""
        if number == 0:
            raise ScaloraError(
                f"task: the assistant speaks first in {place}, and what its turn follows is unknown: begin with a "
                "system or user message, or give a template with generation marks in task.chat_template"
            )
        before = self._write(conversation, number, place, ask=True)
        return len(_beginning(text, before, f"the generation prompt before message {number + 1}", place))

    def _ends(self, conversation: Conversation, number: int, text: str, place: str) -> int:
        """Where message `number` ends."""
        after = self._write(conversation, number + 1, place)
        # Some templates end a conversation, but not a turn, with the end-of-text token.
        shorter = after.removesuffix(self.tokenizer.eos_token or "")
        after = after if text.startswith(after) else shorter
        return len(_beginning(text, after, f"message {number + 1}", place))

    def _write(self, conversation: Conversation, count: int, place: str, *, ask: bool = False) -> str:
        """The first messages as text, with a prompt to go on if it is asked for."""
        return self._try(
            self.tokenizer.apply_chat_template, place, conversation.messages[:count], tools=conversation.tools,
            chat_template=self.template, add_generation_prompt=ask, tokenize=False, **self.options,
        )  # fmt: skip

    def _try(self, call: Callable[..., Any], place: str, *arguments: Any, **options: Any) -> Any:
        """What a call to the template returns; raises ScaloraError, with the row's place, for all that it raises."""
        try:
            return call(*arguments, **options)
        except TemplateSyntaxError as error:
            raise ScaloraError(
                f"task.chat_template: not a template in Jinja ({error}, line {error.lineno}); mend it"
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ScaloraError(
                f"task: the chat template takes no such conversation as that in {place} ({reason}); mend or drop the "
                "row, or give another template in task.chat_template"
            ) from error


def _whole(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What each token spans in its text, from where the one before it ends.

    The white space that a token begins with may be missing from its offsets. Tokens within one character share theirs.
    """
    ends = [0, *(last for _, last in offsets)]
    return [(min(first, before), last) for (first, last), before in zip(offsets, ends, strict=False)]


def _beginning(text: str, start: str, what: str, place: str) -> str:
    """The start of a text; raises ScaloraError where the text begins otherwise."""
    if text.startswith(start):
        return start
    same = next(i for i, (a, b) in enumerate(zip(text + "\0", start + "\0", strict=False)) if a != b)
    wanted, found = (shown(each[max(0, same - 20) : same + 30]) for each in (start, text))
    raise ScaloraError(
        f"task: the chat template writes {what} otherwise once others follow ({wanted}, then {found}) in {place}, so "
        "that what the assistant wrote is unknown: give a template with generation marks in task.chat_template, or "
        "conversations with one reply each"
    )
