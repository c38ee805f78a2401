"""A run in company: train while something else goes on, and hold what must hold at every event."""

from __future__ import annotations

import torch

import scalora
import zoo
from events import watch
from scalora import ScaLoraConfig


def frozen(model):
    """A copy of everything that is not being trained, accumulated adapter left out."""
    return {
        name: [part.clone() for part in _parts(p)]
        for name, p in model.named_parameters()
        if not p.requires_grad and ".accumulated." not in name
    }


def _parts(param):
    """The plain tensors of a quantised one: torchao's know no comparison."""
    flatten = getattr(param.data, "__tensor_flatten__", None)
    return [param.detach()] if flatten is None else [getattr(param.data, name) for name in flatten()[0]]


def run(model, optimizer=None, kind="llama", steps=8, between=None, tolerance=1e-5, untouched=True, **config):
    """Train on one batch with an event before every step; ``between(step, handle)`` is called after each.

    Holds: no event changes the logits by more than ``tolerance``; what is frozen stays as it was; the loss falls.
    """
    optimizer = optimizer or torch.optim.AdamW(zoo.trainable(model), lr=3e-3)
    before = frozen(model)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(**{"interval": 1, **config}))
    changes, losses = watch(handle, model, kind), []
    for step in range(steps):
        loss = model(**zoo.batch(kind)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if between is not None:
            between(step, handle)
    assert len(changes) == steps
    assert max(change for change, _ in changes) < tolerance
    assert max(event.moved for event in handle.stats) > 1e-3  # something did move
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    if untouched and handle.config.accumulate == "adapter":
        still = [name for name in before if not after[name].requires_grad]
        assert all(torch.equal(a, b) for n in still for a, b in zip(_parts(after[n]), before[n], strict=True))
    return handle
