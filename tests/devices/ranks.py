"""Two gloo processes on this machine, forked from a warm one that has imported everything once."""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import multiprocessing

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
