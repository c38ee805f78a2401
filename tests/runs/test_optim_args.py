"""`optim_args`: our table of what transformers reads is transformers' own; what it would pass over is refused."""

import inspect
import re

import pytest
from transformers import trainer_optimizer

from scalora.common.errors import ScaloraError
from scalora.runs.optim_args import READ, WHOLE
from scalora.runs.recipe import parse_recipe

HANDLERS = trainer_optimizer._OPTIMIZER_HANDLERS


@pytest.mark.parametrize("optim", sorted(str(name.value) for name in HANDLERS))
def test_the_table_is_what_the_handler_reads(optim):
    text = inspect.getsource(HANDLERS[optim])
    if text.startswith("def _get_bitsandbytes"):  # one for several optimizers
        text = re.search(r'elif "ademamix".*?bnb_kwargs', text, re.DOTALL)[0] if "ademamix" in optim else ""
    named = set(re.findall(r'optim_args\.(?:get|pop)\("(\w+)"', text)) | set(re.findall(r'"(\w+)" in ctx\.optim', text))
    for names in re.findall(r"for key in \(([^)]*)\)", text):
        named |= set(re.findall(r'"(\w+)"', names))
    if optim not in WHOLE:
        assert named == set(READ.get(optim, ()))


RECIPE = {
    "model": "x",
    "task": {"kind": "text", "data": {"train": "x.txt", "test": "y.txt"}},
    "method": {"name": "lora"},
    "output": "x",
}


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "did you mean 'momentum'?"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,beta=1"}, "choose from momentum, dampening"),
        ({"optim_args": "beta1=0.9"}, "leave it out (learning rate"),
        ({"optim": "lion_8bit", "optim_args": "beta1=0.9"}, "transformers reads none with optim: lion_8bit"),
    ],
)
def test_what_would_be_passed_over_is_refused(training, words):
    with pytest.raises(ScaloraError, match=re.escape(words)) as caught:
        parse_recipe({**RECIPE, "training": training})
    assert "optim_args" in str(caught.value)


@pytest.mark.parametrize(
    "training",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "ademamix_8bit", "optim_args": "beta3=0.9"},
        {"optim": "rmsprop_bnb", "optim_args": "whatever=1"},  # bitsandbytes itself says no
    ],
)
def test_what_is_read_passes(training):
    assert parse_recipe({**RECIPE, "training": training}).training["optim_args"] == training["optim_args"]
