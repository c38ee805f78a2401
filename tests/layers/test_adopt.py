"""A class put in front of a live module's own: once, and kept by copies and pickles."""

import copy
import io
import pickle

import torch
from torch import nn

from scalora.layers.adopt import adopt


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_module_keeps_what_it_is_and_does_what_the_mixin_says():
    module = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    before = module(x)
    assert adopt(module, Doubled) is module
    adopt(module, Doubled)  # a second time changes nothing
    assert isinstance(module, nn.Linear)
    assert type(module).__name__ == "Linear"
    assert torch.equal(module(x), 2 * before)


def test_copies_and_pickles_keep_it():
    module = adopt(nn.Linear(3, 2), Doubled)
    x = torch.randn(4, 3)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module)), saved):
        assert type(other) is type(module)
        assert torch.equal(other(x), module(x))
