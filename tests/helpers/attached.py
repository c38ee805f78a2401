"""Tiny models with ScaLoRA attached, and a watch on what its events do to the function."""

import torch

import scalora
from helpers import models
from scalora import ScaLoraConfig


def attached(
    kind="llama", dtype=torch.float32, optimizer_cls=torch.optim.AdamW, lr=3e-3, lora=None, opt=None, layers=2, **config
):
    model = models.lora(kind, dtype, layers, **(lora or {}))
    optimizer = optimizer_cls(models.trainable(model), lr=lr, **(opt or {}))
    return model, optimizer, scalora.attach(model, optimizer, ScaLoraConfig(**{"interval": 1, **config}))


def full(store):
    """Whether the next event recompresses."""
    return getattr(store, "free", 1) < 1


def watch(handle, model, kind):
    """Record how much each event changes the logits, and whether a recompression was part of it."""
    changes, inner = [], handle.rescale

    def event():
        recompressed = full(handle.store)
        before = models.logits(model, kind)
        inner()
        changes.append(((models.logits(model, kind) - before).abs().max().item(), recompressed))

    handle.rescale = event
    return changes


def accumulated(layer):
    P, Qt = layer.accumulated.columns()
    return layer.scale * P.double() @ Qt.double()


def frozen(model):
    """A copy of everything that is not being trained, accumulated columns left out."""
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
    optimizer = optimizer or torch.optim.AdamW(models.trainable(model), lr=3e-3)
    before = frozen(model)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(**{"interval": 1, **config}))
    changes, losses = watch(handle, model, kind), []
    for step in range(steps):
        loss = model(**models.batch(kind)).loss
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
