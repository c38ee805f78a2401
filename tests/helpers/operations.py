"""What is done on a device: operations by name, and about how many kernels they would launch on a GPU."""

from collections import Counter
from itertools import chain

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNEL = {"_unsafe_view", "_local_scalar_dense", "lift_fresh", "lift", "is_same_size", "promote_types"}
_TENSORS = 48  # of a list that torch handles in one launch, where they lie alike


class Operations(TorchDispatchMode):
    """The operations called inside by name, their launches, and the largest tensor that one of them made.

    Views and empty tensors launch nothing. What torch does with lists of tensors is one launch for many only where all
    are dense, of one dtype, and those of a pair alike in size and strides; else it is one for each. A factorisation
    counts as one, however many kernels its library takes.
    """

    def __init__(self):
        super().__init__()
        self.launched, self.names, self.largest = Counter(), set(), 0

    @property
    def launches(self):
        return self.launched.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.add(name)
        self.launched[name] += _launches(func, name, args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def _launches(func, name, args):
    if name.startswith("_foreach"):
        lists = [a for a in args if isinstance(a, list | tuple) and all(isinstance(t, torch.Tensor) for t in a)]
        return -(-len(lists[0]) // _TENSORS) if _alike(lists) else len(lists[0])
    shares = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return int(not (shares or name in _NO_KERNEL or "empty" in name))


def _alike(lists):
    everyone = [t for t in chain(*lists) if t.ndim or len(lists) == 1]
    dense = all(t.dtype == everyone[0].dtype and torch.ops.aten.is_non_overlapping_and_dense(t) for t in everyone)
    pairs = zip(*lists, strict=True)
    return dense and all(t.shape == pair[0].shape and t.stride() == pair[0].stride() for pair in pairs for t in pair)
