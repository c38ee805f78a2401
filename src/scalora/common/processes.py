"""The processes of one run, as torchrun or accelerate start them: they share work, agree, and end as one.

What is exchanged goes over gloo, in a group of its own: no device waits for it, and a process that fails finds the
others at their next exchange, whatever that is for. In a run of one process nothing here does anything.
"""

from __future__ import annotations

import math
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import AgreedError, ScaloraError
from .launch import launched
from .stopping import led_to

Made = TypeVar("Made")
Piece = TypeVar("Piece")

_PATIENCE = 10.0  # seconds that a failed process waits for the others to hear of it
_group: Any = None


@contextmanager
def one_run() -> Iterator[None]:
    """Within, the processes that a launcher has started are one run; nothing happens where there is one, or twice.

    Raises:
        ScaloraError: the launcher does not say how the processes find one another.
    """
    global _group
    if launched() == 1 or _group is not None:
        yield
        return
    ours = not dist.is_initialized()
    if ours:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise ScaloraError(
                f"WORLD_SIZE is {launched()}, but {', '.join(missing)} not set: start several processes by torchrun or "
                "accelerate launch, or unset WORLD_SIZE"
            )
        dist.init_process_group(_backend())
    _group = dist.new_group(backend="gloo")
    yield  # after an error nobody tidies up: the others may be waiting in a collective
    _group = None
    if ours:
        dist.destroy_process_group()


def _backend() -> str:
    """One that takes tensors on the CPU and on the device."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type == "mps":
        return "gloo"
    return f"cpu:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator)}"


def count() -> int:
    """How many processes the run has."""
    return 1 if _group is None else dist.get_world_size()


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _group is None or dist.get_rank() == 0


def from_all(value: Made) -> list[Made]:
    """The values of all processes, by rank; each must be one that pickle takes. A collective, as all below.

    Raises:
        AgreedError: a process has failed.
    """
    return [value] if _group is None else _exchange(value)


def any_of(flag: bool) -> bool:
    """Whether it is true on any process."""
    return any(from_all(flag))


def from_first(make: Callable[[], Made]) -> Made:
    """What the first process makes, on all of them."""
    if _group is None:
        return make()
    if not is_first():
        return from_all(None)[0]  # pyright: ignore[reportReturnType]
    try:
        value = make()
    except ScaloraError as error:
        _fail(error)
        raise
    return from_all(value)[0]


def shared_out(parts: Sequence[Piece], work: Callable[[Piece], Made]) -> list[Made]:
    """What ``work`` makes of every part, in order; each part is done by one process.

    All do equally many, since a model that is sharded computes only where all processes do.
    """
    if _group is None:
        return [work(part) for part in parts]
    rank, processes = dist.get_rank(), count()
    mine = [work(part) for part in parts[rank::processes]]
    if parts and len(mine) < math.ceil(len(parts) / processes):
        work(parts[0])
    everyone = from_all(mine)
    return [everyone[i % processes][i // processes] for i in range(len(parts))]


@contextmanager
def ending_together() -> Iterator[None]:
    """Within, what fails on one process fails on all, with that process's message.

    Raises:
        AgreedError: a process has failed, or has ended.
    """
    if _group is None:
        yield
        return
    try:
        yield
        from_all(None)
    except AgreedError:
        raise
    except ScaloraError as error:
        _fail(error)
        raise
    except (Exception, KeyboardInterrupt) as error:  # the launcher's SIGTERM may come on top
        if not any(map(_is_of_a_lost_peer, led_to(error))):
            raise
        raise AgreedError(
            "another process of this run has ended: its own message, or the launcher's, says why; then continue from "
            "the last checkpoint with --resume"
        ) from error


def _is_of_a_lost_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo/" in str(error))


def _exchange(value: Any, failed: bool = False) -> list[Any]:
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    heads = [torch.empty(2, dtype=torch.int64) for _ in range(count())]
    dist.all_gather(heads, torch.tensor([failed, len(content)]), group=_group)
    sizes = [int(head[1]) for head in heads]
    padded = torch.nn.functional.pad(content, (0, max(sizes) - len(content)))
    parts = [torch.empty_like(padded) for _ in heads]
    dist.all_gather(parts, padded, group=_group)
    found = [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]
    failures = {rank: found[rank] for rank, head in enumerate(heads) if head[0]}
    if failures:
        rank, message = next(iter(failures.items()))
        raise AgreedError(f"{message} (process {rank} of {len(heads)}, counted from 0)" if rank else message)
    return found


def _fail(error: ScaloraError) -> None:
    """Tell the others; raises what all of them raise, unless they do not come to hear it."""
    heard: list[AgreedError] = []

    def tell() -> None:
        try:
            _exchange(str(error), failed=True)
        except AgreedError as agreed:
            heard.append(agreed)
        except RuntimeError:  # they have ended
            return

    thread = threading.Thread(target=tell, daemon=True)  # the others may be waiting for this process elsewhere
    thread.start()
    thread.join(_PATIENCE)
    if heard:
        raise heard[0] from error
