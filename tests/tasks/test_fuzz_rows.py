"""Any cell in any row: it can be learnt from, or there is one message with the row's place; never a traceback."""

import math
from contextlib import contextmanager, suppress

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from helpers import chats, images
from helpers.every_kind import CHAT, GOOD, KINDS, rows, task
from scalora.common.errors import ScaloraError

CELLS = (
    None, True, False, 0, 1, 7, -1, 0.5, 1e300, math.nan, math.inf, "", " ", "0", "1", "nan", "yes", "sat on", "\0",
    "\ud800", "\u200b", "\u0001", "<pad>", "<eos>", "<|im_end|>", "{", "[1]", "[]", '["a", "b"]', "['a' 'b']", "[0 1]",
    "the cat " * 40, [], [None], [[]], [0], ["a"], ["a", "b"], ["O", "B-PET"], [1, 2, 3], [math.nan, 1.0], {}, {"a": 1},
    {"bytes": None, "path": None}, {"bytes": "x"}, {"bytes": None, "path": "none.png"}, [{}], [{"role": "user"}], CHAT,
    CHAT[:1], CHAT[::-1], [*CHAT, {"role": "assistant", "content": None}], [{"role": 3, "content": []}],
    [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], [{"from": "x", "value": 1}], "there.png", ".",
)  # fmt: skip
FUZZ = settings(
    deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate], derandomize=True,
    max_examples=60,
)  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    images.picture(0).save(folder / "there.png")
    return folder, chats.tokenizer(), images.processor()


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(sorted(GOOD)), st.sampled_from(CELLS), min_size=1, max_size=6),
    allowed=st.sampled_from([0, 1]),
)
def test_any_cell_is_learnt_from_or_refused_by_its_place(ground, kind, changes, allowed):
    folder, tokenizer, processor = ground
    reader = processor if kind == "image_classification" else tokenizer
    limit = {} if kind in ("image_classification", "vectors") else {"max_length": 60}
    built = task(folder, kind, rows(kind, changes), {"max_bad_rows": allowed, "max_long_rows": allowed}, **limit)
    with suppress(ScaloraError), placed():
        for split in ("train", "test"):
            dataset = built.train_dataset(reader, split)
            if kind != "preference":  # whose batches need the base model's own view
                built.collator(reader)([dataset[i] for i in range(len(dataset))])
        counts = [len(built.rows(split)) for split in ("train", "test")]
        assert counts in ([9, 9], [10, 10])
        assert allowed or counts == [10, 10]


@contextmanager
def placed():
    """What is refused names its row, or what is wrong with all rows together."""
    try:
        yield
    except ScaloraError as error:
        said = str(error)
        if not any(words in said for words in ("line 5, row 5", "task.labels", "task.tags", "vectors of")):
            raise AssertionError(said) from error
        raise
