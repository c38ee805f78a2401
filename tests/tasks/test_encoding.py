"""The model reads a row's prompt and what follows it as one text, cut where they meet: all of it, or a refusal."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from transformers import ByT5Tokenizer

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.tasks import build_task
from scalora.tasks.completion import CompletionSpec
from scalora.tasks.data.rows import PlacedRow
from scalora.tasks.encoding import encode, encode_prompts
from scalora.tasks.multiple_choice import MultipleChoiceSpec


def _metaspace():
    """Spaces are written as ▁, one is put in front, bytes stand in for what is unknown: as Llama's first tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abehlnorst:123", "he", "▁he", "lo"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    inner = Tokenizer(
        models.BPE(vocab, [("h", "e"), ("▁", "he"), ("l", "o")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


TOKENIZERS = {
    "words": tokenized.tokenizer(),
    "bytes": tokenized.byte_level(),
    "with an end": tokenized.byte_level(ending=True),
    "lower-casing": tokenized.byte_level(Lowercase=True),
    "stripping": tokenized.byte_level(Strip=True),
    "composing": tokenized.byte_level(NFC=True),
    "accents": tokenized.byte_level(StripAccents=True),
    "metaspace": _metaspace(),
    "slow": ByT5Tokenizer(extra_ids=0),  # whose own habit is to end texts
}


def _read(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["bytes", "with an end", "metaspace", "slow"])
@settings(max_examples=150)
@given(
    prompt=st.text(st.sampled_from("helo wrdns:123A\n é👍"), max_size=12),
    following=st.text(st.sampled_from("helo wrdns:123A\n é👍"), min_size=1, max_size=12),
)
def test_nothing_is_lost(name, prompt, following):
    tokenizer = TOKENIZERS[name]
    try:
        before, after = encode(tokenizer, [(prompt, following)])[0]
    except ScaloraError:
        assert not following.strip()
        return
    plain = tokenizer(prompt + following, add_special_tokens=False)["input_ids"]
    assert (before + after)[-len(plain) :] == plain
    # No token of the prompt has a character of what follows it, whichever of the two the spaces between belong to.
    assert len(after) >= len(plain) - len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60)
@given(following=st.text(st.sampled_from("catbluei ,.\nAÉéﬁ"), min_size=1, max_size=10))
def test_what_a_tokenizer_changes_is_refused(name, following):
    tokenizer = TOKENIZERS[name]
    try:
        before, after = encode(tokenizer, [("the sky is", following)])[0]
    except ScaloraError:
        return
    read = _read(tokenizer, before + after)
    if name == "words":  # single spaces are implied
        assert "".join(read.split()).endswith("".join(following.split()))
    elif name == "composing":
        import unicodedata

        assert unicodedata.normalize("NFC", following) == read[-len(unicodedata.normalize("NFC", following)) :]
    else:
        assert read.endswith(following)


@pytest.mark.parametrize(
    ("name", "following"),
    [
        ("lower-casing", " Yes"),
        ("stripping", " yes "),
        ("accents", " ne\u0301"),
        ("words", " cat\ndog"),
        ("words", " zebra"),
    ],
)
def test_what_is_not_kept_is_named(name, following):
    message = r"task: the text ' .*' after the prompt 'the' in rows\.csv, line 3 is not kept by the tokenizer"
    with pytest.raises(ScaloraError, match=message):
        encode(TOKENIZERS[name], [("the", following)], [PlacedRow({}, "rows.csv, line 3")])


@pytest.mark.parametrize("following", ["3 apples", "3", "3\n", " 3"])
def test_a_token_that_spans_the_joint_is_the_following_text_s(following):
    tokenizer = TOKENIZERS["bytes"]
    before, after = encode(tokenizer, [("Question: 12", following)])[0]
    assert _read(tokenizer, before + after) == "Question: 12" + following
    assert _read(tokenizer, after).endswith(following)
    assert _read(tokenizer, before) == ("Question: 12" if following == " 3" else "Question:")


def test_the_choices_of_a_row_are_cut_at_one_place():
    tokenizer, choices = TOKENIZERS["bytes"], ["3", "7"]  # "123" is a token, "127" is none
    row = PlacedRow({}, "row 1")
    pairs = encode(tokenizer, [("Question: 12", choice) for choice in choices], [row, row])
    assert [_read(tokenizer, before) for before, _ in pairs] == ["Question:"] * 2
    assert [_read(tokenizer, after) for _, after in pairs] == [" 123", " 127"]
    apart = encode(tokenizer, [("Question: 12", choice) for choice in choices])
    assert [_read(tokenizer, after) for _, after in apart] == [" 123", "7"]


def test_prompts_that_differ_by_their_choice_must_end_before_the_text(tmp_path):
    path = tokenized.write_jsonl(tmp_path / "rows.jsonl", [{"choices": ["12", "no"], "answer": 0}] * 2)
    spec = MultipleChoiceSpec(data={"train": path, "test": path}, prompt="Question: {choice}", continuation="3 apples")
    with pytest.raises(ScaloraError, match=r"runs into the last word of 'Question: 12' in .*begin it with a space"):
        build_task(spec).train_dataset(TOKENIZERS["bytes"])


def test_choices_that_become_the_same_are_refused(tmp_path):
    path = tokenized.write_jsonl(tmp_path / "rows.jsonl", [{"choices": [" a b", " a  b"], "answer": 0}] * 2)
    spec = MultipleChoiceSpec(data={"train": path, "test": path}, prompt="the")
    with pytest.raises(ScaloraError, match=r"' a  b' after the prompt 'the' in .* is not kept"):
        build_task(spec).train_dataset(TOKENIZERS["words"])
    path = tokenized.write_jsonl(tmp_path / "rows.jsonl", [{"choices": [" é", " e\u0301"], "answer": 0}] * 2)
    spec = MultipleChoiceSpec(data={"train": path, "test": path}, prompt="the")
    with pytest.raises(ScaloraError, match="makes the same of the choices"):
        build_task(spec).train_dataset(TOKENIZERS["composing"])


@pytest.mark.parametrize("prompt", ["Question:", ""])
def test_an_end_that_a_tokenizer_adds_is_between_no_two_texts(tmp_path, prompt):
    tokenizer = TOKENIZERS["with an end"]
    path = tokenized.write_jsonl(tmp_path / "rows.jsonl", [{"a": "yes"}, {"a": "no"}])
    spec = CompletionSpec(data={"train": path, "test": path}, prompt=prompt, completion=" {a}")
    assert [_read(tokenizer, row["input_ids"]) for row in build_task(spec).train_dataset(tokenizer, "test")] == [
        f"<bos>{prompt} yes<eos>", f"<bos>{prompt} no<eos>",
    ]  # fmt: skip
    assert [_read(tokenizer, ids) for ids in encode_prompts(tokenizer, [prompt, "no \n", "no "])] == [
        f"<bos>{prompt}", "<bos>no \n", "<bos>no",
    ]  # fmt: skip


def test_a_start_that_a_row_brings_along_is_not_doubled():
    tokenizer = TOKENIZERS["with an end"]
    before, _ = encode(tokenizer, [("<bos>Question:", " yes")])[0]
    assert _read(tokenizer, before) == "<bos>Question:"
    assert _read(tokenizer, encode_prompts(tokenizer, ["<bos>Question:"])[0]) == "<bos>Question:"


def test_habits_that_were_saved_with_a_tokenizer_cut_nothing(tmp_path):
    """tokenizer.json may hold a truncation and a padding, which would apply to every text."""
    tokenizer = tokenized.byte_level()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    before, after = encode(again, [("Question: 12 apples", " hello world")])[0]
    assert _read(again, before + after) == "Question: 12 apples hello world"


def test_a_line_end_that_is_one_token_with_the_prompt_is_the_prompt_s():
    tokenizer = TOKENIZERS["bytes"]
    assert tokenizer.tokenize("Answer:\n\n")[-1].endswith("Ċ")
    before, after = encode(tokenizer, [("Answer:\n\n", "yes")])[0]
    assert _read(tokenizer, before) + _read(tokenizer, after) == "Answer:\n\nyes"
