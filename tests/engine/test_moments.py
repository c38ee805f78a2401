"""The metric of a layer's inputs, as training sees them: against the inputs themselves."""

import pytest
import torch

import scalora
from helpers import models
from scalora import ScaLoraConfig


def attached(kind="llama", **options):
    model = models.lora(kind, r=2, **options)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-3)
    config = ScaLoraConfig(interval=None, refresh=2, metric="inputs")
    return model, optimizer, scalora.attach(model, optimizer, config)


def recorded(handle):
    """The inputs of each layer, each times the norm of its output's gradient, (T, n), by pass."""
    seen = {layer.name: [] for layer in handle.layers}

    def listen(name, x, result):
        def keep(g):
            seen[name].append((x.detach() * g.norm(dim=-1, keepdim=True)).flatten(0, -2))

        result.register_hook(keep)

    for layer in handle.layers:
        layer.module.register_forward_hook(lambda _, args, out, name=layer.name: listen(name, args[0], out))
    return seen


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.3}], ids=["fused", "PEFT's own forward"])
def test_it_is_that_of_the_inputs_of_one_step(kind, lora):
    model, optimizer, handle = attached(kind, **lora)
    models.train(model, optimizer, kind, 1)  # the first step opens the first look
    seen = recorded(handle)
    for part in (0, 1):  # micro-batches
        model(**models.batch(kind, part)).loss.backward()
    optimizer.step()
    for layer, metric in zip(handle.layers, handle.refresh.moments.metrics, strict=True):
        x = torch.cat(seen[layer.name]).double()
        size = x.square().sum() / x.shape[1]
        direction = metric.U[:, 0].double()  # some eigenvector, wide layers having more than are followed
        energy = (x @ direction).square().sum() / size
        torch.testing.assert_close(metric.energy(metric.U[:, :1])[0], energy.float(), rtol=0.05, atol=1e-3)
        if metric.U.shape[0] == metric.U.shape[1]:
            C = x.mT @ x / size
            torch.testing.assert_close((metric.U * metric.e) @ metric.U.mT, C.float(), rtol=1e-3, atol=1e-3)


def test_what_gets_no_gradient_does_not_count():
    """Padding on the right changes no metric."""
    found = []
    for padding in (0, 5):
        model, optimizer, handle = attached()
        batch = models.batch("llama")
        ids = torch.nn.functional.pad(batch["input_ids"], (0, padding), value=1)
        for _ in range(2):
            mask = torch.arange(ids.shape[1]).expand_as(ids) < ids.shape[1] - padding
            labels = ids.masked_fill(~mask, -100)
            model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([torch.cat([m.e, m.tail[None]]) for m in handle.refresh.moments.metrics])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_looking_costs_one_step_of_each_window():
    model, optimizer, handle = attached()
    looking = []
    for step in range(6):
        models.train(model, optimizer, "llama", 1, start=step)
        looking.append(handle.refresh.moments.looking)
    assert looking == [True, False] * 3
    handle.detach()
    assert all(layer.module.inputs is None for layer in handle.layers)
