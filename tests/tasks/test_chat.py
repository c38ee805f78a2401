import math

import pytest
import torch

from helpers import chats, tokenized
from helpers.chats import said
from scalora.common.errors import ScaloraError
from scalora.tasks import build_task
from scalora.tasks.chat import ChatSpec

SHORT = said(("user", "a"), ("assistant", "b"))
ROWS = [{"messages": messages} for messages in (chats.TWO_TURNS, chats.ONE_TURN, SHORT)]


def task(folder, rows=ROWS, data=None, **fields):
    path = tokenized.write_jsonl(folder / "rows.jsonl", rows)
    return build_task(ChatSpec(data={"train": path, "test": path, **(data or {})}, **fields))


def learnt(built, tokenizer, number=0):
    example = built.train_dataset(tokenizer, "test")[number]
    return tokenizer.decode([label for label in example["labels"] if label != -100])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_score_is_nats_per_token_of_the_assistants(tmp_path, batch_size):
    model, tokenizer = chats.llama().eval(), chats.tokenizer()
    built = task(tmp_path)
    score = built.score(model, tokenizer, batch_size=batch_size)
    total, count = 0.0, 0
    for example, prediction in zip(built.train_dataset(tokenizer, "test"), score.predictions, strict=True):
        tokens = sum(label != -100 for label in example["labels"])
        with torch.no_grad():
            loss = model(**{name: torch.tensor([value]) for name, value in example.items()}).loss.item()
        assert prediction.probability == pytest.approx(math.exp(-loss), rel=1e-4)
        total, count = total + loss * tokens, count + tokens
    assert score.metrics == {"nll": pytest.approx(total / count, rel=1e-4)}
    assert score.predictions[1].text == "user: hello world"
    assert score.predictions[1].expected == "Question: 😀"
    assert not score.higher_is_better


def test_labels_are_those_of_trls_trainer(tmp_path):
    """`assistant_only_loss`, with a template that it marks by itself; tokens after the last turn are not read here."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from trl.chat_template_utils import llama3_chat_template

    trainer = trl.SFTTrainer(
        chats.llama(),
        args=trl.SFTConfig(str(tmp_path / "trl"), assistant_only_loss=True, report_to=[], use_cpu=True),
        train_dataset=datasets.Dataset.from_list(ROWS), processing_class=chats.tokenizer(llama3_chat_template),
    )  # fmt: skip
    ours = task(tmp_path).train_dataset(chats.tokenizer(llama3_chat_template), "test")
    for example, row in zip(ours, trainer.train_dataset, strict=True):
        batch = trainer.data_collator([row])
        assert example["input_ids"] == batch["input_ids"][0].tolist()
        assert example["labels"] == batch["labels"][0].tolist()


def test_what_follows_the_last_turn_is_not_read(tmp_path):
    tokenizer = chats.tokenizer()
    rows = [{"messages": [*chats.ONE_TURN, *said(("user", "more"))]}, ROWS[1]]
    asked, plain = task(tmp_path, rows).train_dataset(tokenizer, "test")
    assert asked == plain


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hello", "completion": "yes"},
        {"prompt": chats.ONE_TURN[:1], "completion": "yes"},
        {"prompt": chats.TWO_TURNS[:4], "completion": said(("assistant", "yes"))},
    ],
)
def test_of_prompt_and_completion_the_completion_is_learnt(tmp_path, row):
    tokenizer = chats.tokenizer()
    for system in (None, "be good"):
        assert learnt(task(tmp_path, [row], prompt="prompt", completion="completion", system=system), tokenizer) == (
            "yes<|im_end|>\n"
        )


def test_system_messages_are_given_to_those_that_have_none(tmp_path):
    tokenizer = chats.tokenizer()
    rows = [{"messages": row["messages"], "mood": "hello"} for row in ROWS]
    own, given, _ = task(tmp_path, rows, system="say {mood}").train_dataset(tokenizer, "test")
    assert "say hello" not in tokenizer.decode(own["input_ids"])
    assert tokenizer.decode(given["input_ids"]).startswith("<|im_start|>system\nsay hello<|im_end|>\n<|im_start|>user")


def test_tools_reach_the_template_and_rows_may_lack_them(tmp_path):
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + chats.CHATML
    tokenizer = chats.tokenizer(template)
    rows = [{**ROWS[0], "tools": [{"name": "look"}]}, {**ROWS[1], "tools": None}, ROWS[2]]
    built = task(tmp_path, rows, tools="tools")
    texts = [tokenizer.decode(each["input_ids"]) for each in built.train_dataset(tokenizer, "test")]
    assert [text.startswith("look") for text in texts] == [True, False, False]


def test_tools_that_no_row_has_are_refused(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "tools": [{"name": "look"}]}]
    message = r"no column 'toolz' in .*rows\.jsonl; it has .*tools.* — did you mean 'tools'\?"
    for fields in ({"tools": "toolz"}, {"tools": "tools", "data": {"columns": {"tools": "toolz"}}}):
        with pytest.raises(ScaloraError, match=message):
            _ = task(tmp_path, rows, **fields).splits


def test_a_test_split_without_tools_is_told(tmp_path):
    path = tokenized.write_jsonl(tmp_path / "test.jsonl", ROWS)
    built = task(tmp_path, [{**ROWS[0], "tools": [{"name": "look"}]}], {"test": path}, tools="tools")
    assert len(built.rows("test")) == 3
    assert f"task.data.test: no row of {path} has the column 'tools'" in built.notes


def test_sharegpt_by_its_own_column(tmp_path):
    tokenizer = chats.tokenizer()
    rows = [{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]}]
    assert learnt(task(tmp_path, rows, messages="conversations"), tokenizer) == "yes<|im_end|>\n"
    assert learnt(task(tmp_path, rows, data={"columns": {"messages": "conversations"}}), tokenizer) == "yes<|im_end|>\n"


def test_rows_that_are_too_long_are_left_out_and_said_once(tmp_path):
    tokenizer = chats.tokenizer()
    lengths = [len(each["input_ids"]) for each in task(tmp_path).train_dataset(tokenizer, "test")]
    limit = sorted(lengths)[1]
    built = task(tmp_path, max_length=limit)
    for _ in range(2):
        dataset = built.train_dataset(tokenizer, "test")
        assert [len(each["input_ids"]) for each in dataset] == [each for each in lengths if each <= limit]
    assert len(built.score(chats.llama(), tokenizer).predictions) == 2
    (note,) = built.notes[1:]
    assert note == (
        f"1 of 3 test rows need more tokens than task.max_length, {limit}, and are left out: the first, "
        f"{tmp_path}/rows.jsonl, line 1, row 1, needs {lengths[0]}"
    )
    with pytest.raises(ScaloraError, match=r"task\.data\.max_long_rows is 0, but 1 of 3 test rows .*row 1, needs"):
        task(tmp_path, max_length=limit, data={"max_long_rows": 0}).train_dataset(tokenizer, "test")
    with pytest.raises(ScaloraError, match=r"3 of 3 test rows need more tokens than task\.max_length, 2 .*raise"):
        task(tmp_path, max_length=2).train_dataset(tokenizer, "test")


def test_a_template_without_ends_is_told(tmp_path):
    tokenizer = chats.tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    built = task(tmp_path)
    built.train_dataset(tokenizer)
    assert any("does not learn when to stop" in note for note in built.notes)


def test_mistakes(tmp_path):
    with pytest.raises(ScaloraError, match=r"task\.messages: no message is the assistant's in .*, line 1, row 1"):
        _ = task(tmp_path, [{"messages": chats.ONE_TURN[:1]}]).splits
    with pytest.raises(ScaloraError, match=r"task\.prompt: 3 is not a text or a list of messages in .*row 1"):
        _ = task(tmp_path, [{"p": 3, "c": "a"}], prompt="p", completion="c").splits
    with pytest.raises(ScaloraError, match="no column 'messages'"):
        _ = task(tmp_path, [{"talk": []}]).splits
    with pytest.raises(ValueError, match="prompt and completion belong together"):
        task(tmp_path, prompt="p")
    with pytest.raises(ValueError, match="give one of the two"):
        task(tmp_path, prompt="p", completion="c", messages="messages")
    with pytest.raises(ScaloraError, match="has no chat template"):
        task(tmp_path).train_dataset(tokenized.tokenizer())
