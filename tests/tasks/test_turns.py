"""Which tokens of a conversation the assistant wrote: by our own definition, and beside TRL's masks."""

from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import chats, tokenized
from helpers.chats import said
from scalora.common.errors import ScaloraError
from scalora.tasks.conversations import Conversation
from scalora.tasks.turns import ChatTemplate

CONVERSATIONS = {
    "one": chats.ONE_TURN,
    "system": chats.TWO_TURNS,
    "several": chats.TWO_TURNS[1:],
    "open": [*chats.ONE_TURN, *said(("user", "yes"))],
}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": 12}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALLED = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "look", "content": "123"},
    {"role": "assistant", "content": "12 apples"},
]
MARKED = chats.CHATML.replace(
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n",
    "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}",
)


def read(tokenizer, messages, given=0, tools=None, **options):
    return ChatTemplate(tokenizer, **options).read(Conversation(messages, given, tools), "rows, row 1")


def learnt(tokenizer, turns):
    """What is learnt, as text, in pieces."""
    pieces, before = [], False
    for token, own in zip(*turns, strict=True):
        if own:
            pieces = [*pieces[:-1], [*pieces[-1], token]] if before else [*pieces, [token]]
        before = own
    return [tokenizer.decode(piece) for piece in pieces]


def test_what_the_assistant_says_is_learnt_with_its_end():
    tokenizer = chats.tokenizer()
    assert learnt(tokenizer, read(tokenizer, chats.TWO_TURNS)) == ["yes world<|im_end|>\n", " 123 apples\n<|im_end|>\n"]
    assert learnt(tokenizer, read(tokenizer, chats.TWO_TURNS, given=3)) == [" 123 apples\n<|im_end|>\n"]
    assert learnt(tokenizer, read(tokenizer, chats.ONE_TURN)) == ["Question: 😀<|im_end|>\n"]
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chats.TWO_TURNS)
    assert tokenizer.decode(read(tokenizer, chats.TWO_TURNS).ids) == whole


def test_tokens_that_span_a_turns_ends_belong_to_it():
    """Without tokens of their own between turns, and with one of several tokens for one character at the end."""
    tokenizer = chats.tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    found = read(tokenizer, said(("user", "yes 1"), ("assistant", "2"), ("user", " hello 😀"), ("assistant", "😀")))
    assert learnt(tokenizer, found) == [" 12", "😀"]
    marks = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %} yes{% endfor %}"
    every = read(tokenizer, said(("user", "hello"), ("assistant", "no 😀")), template=marks)
    assert learnt(tokenizer, every)[-1] == "no 😀"
    spaces = chats.tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert learnt(spaces, read(spaces, said(("user", "a"), ("assistant", "b   "), ("user", "c")))) == ["b   \n"]


@cache
def sentencepiece():
    """Tokens that bring the space before them, as Llama 2's and T5's."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    inner.train_from_iterator(
        ["be good hello yes world no 123 apples", "hello world Question: user assistant"], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("make", [tokenized.tokenizer, sentencepiece])
def test_other_tokenizers_too(make, messages):
    tokenizer = make()
    plain, marked = (read(tokenizer, messages, template=template) for template in (chats.CHATML, MARKED))
    assert plain == marked
    assert 0 < sum(plain.learnt) < len(plain.ids) - 5


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_growing_conversations_give_what_marks_give(messages):
    plain, marked = chats.tokenizer(), chats.tokenizer(MARKED)
    assert read(plain, messages) == read(marked, messages)
    assert read(plain, messages, len(messages) - 1 if messages[-1]["role"] == "assistant" else 0) == read(
        marked, messages, len(messages) - 1 if messages[-1]["role"] == "assistant" else 0
    )


NAMES = ("llama3", "phi3", "phi3_5", "gemma", "gemma3", "qwen3_instruct_2507", "smolvlm", "lfm2", "cohere")


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_published_templates_give_the_masks_that_trl_gives_them(name, messages):
    """TRL writes marks into published templates; the unmarked ones give the same here."""
    trl = pytest.importorskip("trl.chat_template_utils")
    published = getattr(trl, f"{name}_chat_template")
    marked = getattr(trl, f"{name}_training_chat_template")
    if name == "gemma" and messages[0]["role"] == "system":
        with pytest.raises(ScaloraError, match=r"in rows, row 1 \(System role not"):
            read(chats.tokenizer(published), messages)
        return
    assert "generation %}" not in published
    theirs = chats.tokenizer(marked).apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = read(chats.tokenizer(published), messages)
    assert ours.ids == theirs["input_ids"]
    assert ours.learnt == list(map(bool, theirs["assistant_masks"]))
    assert read(chats.tokenizer(marked), messages) == ours


@pytest.mark.parametrize("name", ["llama3", "qwen3_instruct_2507", "phi3", "lfm2"])
def test_tool_calls_are_passed_through_as_trl_passes_them(name):
    trl = pytest.importorskip("trl.chat_template_utils")
    ours = read(chats.tokenizer(getattr(trl, f"{name}_chat_template")), CALLED, tools=TOOLS)
    theirs = chats.tokenizer(getattr(trl, f"{name}_training_chat_template")).apply_chat_template(
        CALLED, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ours.ids == theirs["input_ids"]
    assert ours.learnt == list(map(bool, theirs["assistant_masks"]))
    if name == "qwen3_instruct_2507":
        text = chats.tokenizer().decode(ours.ids)
        assert '{"name": "look", "arguments": {"where": 12}}' in text
        assert "# Tools" in text


def test_templates_that_rewrite_earlier_turns_are_refused():
    trl = pytest.importorskip("trl.chat_template_utils")
    tokenizer = chats.tokenizer(trl.qwen3_chat_template)
    assert learnt(tokenizer, read(tokenizer, chats.ONE_TURN)) == ["<think>\n\n</think>\n\nQuestion: 😀<|im_end|>\n"]
    with pytest.raises(ScaloraError, match=r"writes message 3 otherwise once others follow \(.*<think>.* in rows, row"):
        read(tokenizer, chats.TWO_TURNS)
    marked = chats.tokenizer()
    assert sum(read(marked, chats.TWO_TURNS, template=trl.qwen3_training_chat_template).learnt)
    with pytest.raises(ScaloraError, match="the generation prompt before message 2 otherwise"):
        read(chats.tokenizer(trl.deepseek_r1_distill_chat_template), chats.ONE_TURN)


def test_options_reach_the_template():
    tokenizer = chats.tokenizer("{{ mood }}" + chats.CHATML)
    found = read(tokenizer, chats.ONE_TURN, options={"mood": "hello"})
    assert tokenizer.decode(found.ids).startswith("hello<|im_start|>user")
    with pytest.raises(ScaloraError, match=r"task\.chat_template_kwargs: 'tokenize' is decided by the task"):
        ChatTemplate(tokenizer, options={"tokenize": False})


def test_whether_the_day_is_written_is_seen():
    dated = chats.tokenizer("{{ date_string or strftime_now('%d %b') }}" + chats.CHATML)
    assert ChatTemplate(dated).dated
    assert not ChatTemplate(dated, options={"date_string": "1 Jan"}).dated
    assert not ChatTemplate(chats.tokenizer()).dated


def test_mistakes():
    tokenizer = chats.tokenizer(None)
    with pytest.raises(
        ScaloraError, match=r"has no chat template: choose an instruction-tuned model, or .*chat_template"
    ):
        ChatTemplate(tokenizer)
    assert read(tokenizer, chats.ONE_TURN, template=chats.CHATML) == read(chats.tokenizer(), chats.ONE_TURN)
    with pytest.raises(ScaloraError, match="the assistant speaks first in rows, row 1"):
        read(chats.tokenizer(), chats.ONE_TURN[1:])
    with pytest.raises(ScaloraError, match=r"task\.chat_template: not a template in Jinja \(Expected .*, line 1\)"):
        read(tokenizer, chats.ONE_TURN, template="{% if %}")
    tokenizer.chat_template = {"tool_use": chats.CHATML}
    with pytest.raises(ScaloraError, match=r"takes no such conversation as that in rows, row 1 \(.*no default"):
        read(tokenizer, chats.ONE_TURN)
    with pytest.raises(ScaloraError, match="writes nothing of the assistant's in rows, row 1"):
        read(tokenizer, chats.ONE_TURN, template="{{ messages[0]['content'] }}")


def test_whether_turns_end_is_seen():
    ends, goes_on = chats.tokenizer(), chats.tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert ChatTemplate(ends).stops(read(ends, chats.ONE_TURN))
    assert not ChatTemplate(goes_on).stops(read(goes_on, chats.ONE_TURN))
