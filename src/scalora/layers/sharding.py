"""Tensors that are spread over processes (FSDP2's DTensors), gathered whole and written in part.

An event is computed in full, and identically, on every process: what it reads is gathered by :func:`gather_full`, what
it changes is written to this process's shard by :func:`shard_of` and :func:`copy_into`. For ordinary tensors all of
these return what they were given. Under DDP parameters and reduced gradients are whole everywhere: nothing is sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common.errors import ScaloraError

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Replicate, Shard
else:  # a torch built without torch.distributed has nothing sharded
    FSDPModule = FullyShardedDataParallel = DTensor = Replicate = Shard = ()

_DEEPSPEED = "keeps its own flat copies of parameters and optimizer state, so that columns cannot be rescaled"
_WAY_OUT = "use DDP or FSDP2, or attach to the module and optimizer of an engine with ZeRO-1 or 2"


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is spread over processes."""
    return isinstance(tensor, DTensor)


def gather_full(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The full tensors, on every process; those of one mesh and dtype travel in one all-gather.

    A collective: with sharded tensors, every process must call it with the same ones in the same order.

    Raises:
        ScaloraError: a tensor is sharded in more than one way.
    """
    full = list(tensors)
    batches: dict[Any, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
            full[i] = local_shard(tensor)  # replicated, unless it is among the sharded ones
            if (layout := _layout(tensor)) is not None:
                batches[tensor.device_mesh, layout[0], tensor.dtype].append(i)
    for (mesh, axis, _), index in batches.items():
        _all_gather(tensors, index, full, mesh.get_group(axis), mesh.device_type)
    return full


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def shard_range(tensor: Tensor, dim: int) -> slice:
    """The indices along ``dim`` that this process holds."""
    if is_sharded(tensor) and (layout := _layout(tensor)) is not None and layout[1] == dim % tensor.ndim:
        axis, _ = layout
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        size = tensor.shape[dim]
        step = -(-size // tensor.device_mesh.size(axis))  # as DTensor shards: the last parts are shorter, or empty
        return slice(min(coordinate[axis] * step, size), min((coordinate[axis] + 1) * step, size))
    return slice(0, tensor.shape[dim])


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """What of a full tensor, or one that broadcasts against ``like``, belongs to this process's shard of ``like``."""
    if is_sharded(like) and (layout := _layout(like)) is not None:
        dim = layout[1] - like.ndim  # from the right, as broadcasting counts
        if value.ndim >= -dim and value.shape[dim] == like.shape[dim]:
            mine = shard_range(like, dim)
            return value.narrow(dim, mine.start, mine.stop - mine.start)
    return value


def copy_into(
    targets: Sequence[Tensor], values: Sequence[Tensor], corners: Sequence[tuple[int, int]] | None = None
) -> None:
    """Copy full matrices into matrices, at (row, column) where given; each process writes its part of sharded ones."""
    pairs = [
        _meet(target, value, corner)
        for target, value, corner in zip(targets, values, corners or [(0, 0)] * len(targets), strict=True)
    ]
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put the sharded parameters back in place.

    A forward pass without backward leaves full copies there, and what is written to them is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class as it was before ``fully_shard`` put FSDPModule in front of it."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def refuse_flattened(model: nn.Module) -> None:
    """FSDP1 and DeepSpeed keep parameters in flat buffers, where the columns of a matrix cannot be told apart.

    Raises:
        ScaloraError: the model is theirs.
    """
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ScaloraError(
                f"model {name or type(model).__name__} is wrapped by FSDP1 (FullyShardedDataParallel), which flattens "
                "the adapters: use FSDP2 (torch.distributed.fsdp.fully_shard; fsdp_version: 2 with accelerate) or DDP"
            )
        if type(module).__module__.split(".")[0] == "deepspeed" or any(
            hasattr(p, "ds_id") for p in module.parameters(recurse=False)
        ):
            raise ScaloraError(
                f"model {name or type(model).__name__} is managed by DeepSpeed, which {_DEEPSPEED}: {_WAY_OUT}"
            )


def refuse_flattened_optimizer(optimizer: Any) -> None:
    """As :func:`refuse_flattened`, for the optimizer and what it wraps."""
    while optimizer is not None:
        cls = type(optimizer)
        if cls.__module__.split(".")[0] == "deepspeed" or "DeepSpeed" in cls.__name__:
            raise ScaloraError(f"optimizer is DeepSpeed's {cls.__name__}, which {_DEEPSPEED}: {_WAY_OUT}")
        optimizer = getattr(optimizer, "optimizer", None)


def is_writer() -> bool:
    """Whether this process writes files: the only one, or the first."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def differing(tensors: Sequence[Tensor]) -> list[int]:
    """Which of some tensors, whole on every process, are not bitwise equal on all of them. A collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    mine = torch.stack([_checksum(t).to(tensors[0].device) for t in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    unequal = (torch.stack(everyone) != mine).any(0)
    return unequal.nonzero().flatten().tolist()


def _layout(tensor: DTensor) -> tuple[int, int] | None:
    """The mesh axis over which a tensor is sharded, and along which dimension; None if each process has all of it."""
    split = [(axis, p) for axis, p in enumerate(tensor.placements) if type(p) is not Replicate]
    if not split:
        return None
    axis, placement = split[0]
    if len(split) > 1 or type(placement) is not Shard:
        raise ScaloraError(
            f"a tensor of shape {tuple(tensor.shape)} is laid out as {tensor.placements}: only what is sharded along "
            "one dimension (FSDP2, with or without replicas) can be rescaled; leave tensor parallelism out"
        )
    return axis, placement.dim % tensor.ndim


def _all_gather(tensors: Sequence[Tensor], index: list[int], full: list[Tensor], group: Any, device_type: str) -> None:
    """Replace ``full[i]``, this process's parts, by whole tensors; parts are padded to the first one's shape."""
    parts = dist.get_world_size(group)
    dims = {i: _layout(tensors[i])[1] for i in index}  # pyright: ignore
    padded = {i: _padded(full[i], dims[i], -(-tensors[i].shape[dims[i]] // parts)) for i in index}
    mine = torch.cat([p.reshape(-1) for p in padded.values()])
    gathered = torch.empty(parts * mine.numel(), dtype=mine.dtype, device=device_type)
    dist.all_gather_into_tensor(gathered, mine.to(device_type), group=group)
    # Parameters may have been offloaded to the CPU, where the group cannot send: bring them back there.
    pieces = gathered.to(mine.device).view(parts, -1).split([p.numel() for p in padded.values()], 1)
    for i, piece in zip(index, pieces, strict=True):
        whole = torch.cat([row.view(padded[i].shape) for row in piece], dims[i])
        full[i] = whole.narrow(dims[i], 0, tensors[i].shape[dims[i]])


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    pad = [0, 0] * tensor.ndim
    pad[2 * (tensor.ndim - 1 - dim) + 1] = size - tensor.shape[dim]
    return nn.functional.pad(tensor, pad)


def _meet(target: Tensor, value: Tensor, corner: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where a matrix laid into ``target`` at ``corner`` meets this process's part: views of both, of one shape."""
    if target.ndim > value.ndim:  # a convolution's weight, all of it
        value = value.reshape(target.shape)
    if not is_sharded(target):  # nothing to meet, hundreds of times in every event
        if target.shape == value.shape:
            return target, value
        for dim, start in enumerate(corner):
            target = target.narrow(dim, start, value.shape[dim])
        return target, value
    mine = local_shard(target)
    for dim, start in enumerate(corner):
        here = shard_range(target, dim)
        low, high = max(start, here.start), min(start + value.shape[dim], here.stop)
        size = max(high - low, 0)
        mine = mine.narrow(dim, low - here.start if size else 0, size)
        value = value.narrow(dim, low - start if size else 0, size)
    return mine, value


def _checksum(tensor: Tensor) -> Tensor:
    """A 64-bit checksum of a tensor's bits; order matters."""
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8).long()
    return ((bits + 1) * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()
