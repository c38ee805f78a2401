"""Two gloo processes on this machine, and the same training on one process and on two, half of every batch on each."""

import contextlib
import os
import tempfile

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import scalora
from helpers import models
from scalora import ScaLoraConfig
from scalora.layers.sharding import gather_full

_WARM = ["accelerate", "peft", "torch.distributed.fsdp", "torch.distributed.checkpoint", "transformers"]
multiprocessing.get_context("forkserver").set_forkserver_preload(_WARM)


def spawn(function, *args, processes=2):
    """Call ``function(rank, *args)`` in every process of a fresh group; an error in any is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _enter, (processes, f"{folder}/store", function, args), nprocs=processes, start_method="forkserver"
        )


def _enter(rank, processes, store, function, args):
    torch.set_num_threads(1)
    os.environ.update(  # what torchrun sets; accelerate reads it
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT="0"
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    function(rank, *args)
    dist.destroy_process_group()


MICRO = 2  # micro-batches per optimizer step
STEPS = 7  # with rank and capacity 3 the accumulated columns are recompressed before the sixth
REFRESH = 4  # and refreshed before the fifth
REFRESHES = (REFRESH, {"refresh": REFRESH, "coordinates": "white"})


def config(accumulate, refresh=None):
    """``refresh``: its period, or all fields that it has."""
    fields = refresh if isinstance(refresh, dict) else {"refresh": refresh}
    return ScaLoraConfig(interval=1, accumulate=accumulate, capacity=3 if accumulate == "adapter" else None, **fields)


def model(kind, dtype=torch.float64):
    return models.lora(kind, dtype, r=3)  # an odd rank: two processes cannot share it evenly


def optimizer(model, **options):
    return torch.optim.AdamW(models.trainable(model), lr=3e-3, **options)


def shard(model, **options):
    """Every transformer block, then the rest, as the documentation of fully_shard asks."""
    base = model.get_base_model()
    for block in base.transformer.h if hasattr(base, "transformer") else base.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def sharded(kind, accumulate, *, refresh=None, prepare=True, dtype=torch.float64, opt=None, **options):
    """A model sharded by FSDP2, its optimizer and ScaLoRA on it."""
    made = model(kind, dtype)
    if prepare:
        scalora.prepare(made, config(accumulate))
    shard(made, **options)
    models.logits(made, kind)  # an evaluation leaves full parameters in place of the sharded ones of the root
    steps = optimizer(made, **(opt or {}))
    return made, steps, scalora.attach(made, steps, config(accumulate, refresh))


def train(model, optimizer, kind, rank=None, steps=STEPS):
    """Gradients accumulate without synchronisation between; ``rank`` sees its half of every micro-batch."""
    for step in range(steps):
        for micro in range(MICRO):
            batch = models.batch(kind, MICRO * step + micro)
            if rank is not None:
                batch = {name: rows.chunk(2)[rank] for name, rows in batch.items()}
            last = micro == MICRO - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            waits = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if waits else contextlib.nullcontext():
                (model(**batch).loss / MICRO).backward()
        nn.utils.clip_grad_norm_(models.trainable(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def alone(kind, accumulate, refresh=None):
    """The run of one process: its model and handle."""
    one = model(kind)
    steps = optimizer(one)
    handle = scalora.attach(one, steps, config(accumulate, refresh))
    train(one, steps, kind)
    return one, handle


def figures(handle):
    """Adapters, accumulated update and factors of every layer, whole."""
    found = {}
    for layer in handle.layers:
        found[layer.name, "A"], found[layer.name, "B"] = gather_full([layer.A.detach(), layer.Bt.detach()])
        if handle.config.accumulate == "adapter":
            P, Qt = layer.accumulated.columns()
            found[layer.name, "moved"] = P @ Qt
        else:
            found[layer.name, "base"] = gather_full([layer.base_weight])[0]
        found[layer.name, "alpha"], found[layer.name, "beta"] = handle.factors[layer.name]
    return found


def difference(handle, reference):
    """The largest difference between two runs, over everything that :func:`figures` finds."""
    assert len(handle.stats) == len(reference.stats)
    assert handle.stats[-1].moved > 0
    mine, theirs = figures(handle), figures(reference)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)
