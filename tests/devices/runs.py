"""The same training on one process and on two: tiny models, half of every batch on each."""

import contextlib

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import scalora
import zoo
from scalora import ScaLoraConfig
from scalora.sharded import whole

MICRO = 2  # micro-batches per optimizer step
STEPS = 8  # the accumulated adapter of rank 3 is recompressed before the sixth


def config(accumulate, **options):
    return ScaLoraConfig(
        interval=1, accumulate=accumulate, **({"capacity": 3} if accumulate == "adapter" else {}), **options
    )


def model(kind, dtype=torch.float64):
    return zoo.lora(kind, dtype, r=3)


def optimizer(model, **options):
    return torch.optim.AdamW(zoo.trainable(model), lr=3e-3, **options)


def shard(model, **options):
    """Every transformer block, then the rest, as the documentation of fully_shard asks."""
    base = model.get_base_model()
    for block in base.transformer.h if hasattr(base, "transformer") else base.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train(model, optimizer, kind, rank=None, steps=STEPS, start=0):
    """Gradient accumulation without synchronisation between; ``rank`` sees its half of every micro-batch."""
    for step in range(start, start + steps):
        for micro in range(MICRO):
            batch = zoo.batch(kind, MICRO * step + micro)
            if rank is not None:
                batch = {name: rows.chunk(2)[rank] for name, rows in batch.items()}
            last = micro == MICRO - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            quiet = (
                model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
            )
            with quiet:
                (model(**batch).loss / MICRO).backward()
        nn.utils.clip_grad_norm_(zoo.trainable(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def alone(kind, accumulate, **options):
    """The run of one process: its handle."""
    one = model(kind)
    steps = optimizer(one)
    handle = scalora.attach(one, steps, config(accumulate, **options))
    train(one, steps, kind)
    return handle


def figures(handle):
    """Adapters, accumulated update and factors of every layer, whole."""
    found = {}
    for layer in handle.layers:
        found[f"{layer.name} A"], found[f"{layer.name} B"] = whole([layer.A.detach(), layer.Bt.detach()])
        if handle.config.accumulate == "adapter":
            P, Q = whole([layer.frozen().A, layer.frozen().Bt])
            found[f"{layer.name} moved"] = P @ Q
        else:
            found[f"{layer.name} base"] = whole([layer.base_weight])[0]
        found[f"{layer.name} alpha"], found[f"{layer.name} beta"] = handle.factors[layer.name]
    return found


def assert_equal(handle, reference, tolerance=1e-6):
    mine, theirs = figures(handle), figures(reference)
    assert mine.keys() == theirs.keys()
    worst = max((float((mine[name] - theirs[name]).abs().max()), name) for name in mine)
    assert worst[0] <= tolerance, worst
    assert handle.stats[-1].moved > 0
    return worst
