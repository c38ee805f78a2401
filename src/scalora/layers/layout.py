"""Where PEFT's LoRA layers keep the two matrices of an adapter, and how they compute with others of the same kind.

Of a linear layer they are the weights of two linear ones, of a convolution those of two convolutions, of an embedding
two bare parameters. As matrices all are lora_A (r, n) and lora_B (m, r): the n of a convolution counts the entries of
a patch, that of an embedding its tokens.

Experts that are one parameter (E, …, …) of a model have E such pairs in two matrices: lora_A (E·r, n) holds one after
the other, lora_B (m, r·E) the first columns of all, then the second of all. As matrices they are (r, E·n) and (E·m, r),
beside and above one another: a column of the layer is a column of every expert.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import transpose
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lora_a(module: LoraLayer, adapter: str) -> nn.Parameter:
    """lora_A: (r, n), of a convolution (r, in, …)."""
    part: Any = module.lora_A._modules.get(adapter)
    return module.lora_embedding_A[adapter] if part is None else part.weight


def lora_b(module: LoraLayer, adapter: str) -> nn.Parameter:
    """lora_B: (m, r), of a convolution (m, r, 1, …)."""
    part: Any = module.lora_B._modules.get(adapter)
    return module.lora_embedding_B[adapter] if part is None else part.weight


def matrix_keys(module: LoraLayer, adapter: str) -> tuple[str, str]:
    """What lora_A and lora_B are called in the layer's state dict."""
    if adapter in module.lora_embedding_A:
        return f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}"
    return f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"


def experts(module: LoraLayer) -> int:
    """E, the number of matrices that a layer adapts, each by columns of its own; 1 but of a parameter (E, …, …)."""
    return module.num_experts if isinstance(module, ParamWrapper) else 1


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a tensor of floats as torch has it.

    torchao quantises by a tensor class of its own, and says that its dtype is float; bitsandbytes keeps integers.
    """
    return weight.is_floating_point() and f"{type(weight).__module__}.".startswith("torch.")


def is_linear(module: LoraLayer, adapter: str) -> bool:
    """Whether it adapts a linear layer, and both its matrices are weights of such."""
    if isinstance(module, ParamWrapper):
        return False
    return all(isinstance(parts._modules.get(adapter), nn.Linear) for parts in (module.lora_A, module.lora_B))


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight, gradient or state of any of them as a matrix; to be read, for it may be a copy."""
    return tensor if tensor.ndim == 2 else tensor.flatten(1)


def as_rows(lora_A: Tensor, experts: int) -> Tensor:
    """lora_A, its gradient or state as (r, n), of experts (r, E·n); to be read, for it may be a copy."""
    if experts == 1:
        return as_matrix(lora_A)
    return lora_A.unflatten(0, (experts, -1)).transpose(0, 1).flatten(1)


def as_columns(lora_B: Tensor, experts: int) -> Tensor:
    """lora_B, its gradient or state as (m, r), of experts (E·m, r); to be read, for it may be a copy."""
    if experts == 1:
        return as_matrix(lora_B)
    return lora_B.unflatten(1, (-1, experts)).movedim(2, 0).flatten(0, 1)


def like_lora_a(Qt: Tensor, lora_A: Tensor, experts: int = 1) -> Tensor:
    """Qᵀ (k, n), of experts (k, E·n), in the shape of k rows of lora_A."""
    if experts > 1:
        return Qt.unflatten(1, (experts, -1)).transpose(0, 1).flatten(0, 1)
    return Qt if lora_A.ndim == 2 else Qt.reshape(-1, *lora_A.shape[1:])


def like_lora_b(P: Tensor, lora_B: Tensor, experts: int = 1) -> Tensor:
    """P (m, k), of experts (E·m, k), in the shape of k columns of lora_B."""
    if experts > 1:
        return P.unflatten(0, (experts, -1)).movedim(0, 2).flatten(1)
    return P if lora_B.ndim == 2 else P.reshape(*P.shape, *lora_B.shape[2:])


def each_expert(P: Tensor, Qt: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """P (m, k) and Qᵀ (k, n) as they are; of experts (E·m, k) and (k, E·n) as E pairs, (E, m, k) and (E, k, n)."""
    if experts == 1:
        return P, Qt
    return P.unflatten(0, (experts, -1)), Qt.unflatten(1, (experts, -1)).transpose(0, 1)


def thin_pass(module: Any, adapter: str, x: Tensor, P: Tensor, Qt: Tensor) -> Tensor:
    """What an adapter with P (m, k) for lora_B and Qᵀ (k, n) for lora_A would give, but for its scale."""
    if adapter in module.lora_embedding_A:
        found = module._embed(x, Qt.T) @ P.T
        scale = module._get_embed_scale()
        return found if scale is None else found * scale.to(found.dtype)
    x = x.to(P.dtype)
    patches = module.lora_A[adapter]
    if isinstance(patches, CONVOLUTIONS):
        found = patches._conv_forward(x, like_lora_a(Qt, patches.weight), None)
        return module.conv_fn(found, like_lora_b(P, module.lora_B[adapter].weight))
    return nn.functional.linear(nn.functional.linear(x, Qt), P)


def in_weight_layout(module: Any, adapter: str, update: Tensor) -> Tensor:
    """An m×n difference, of experts E×m×n, in the layout of the layer's weight."""
    if isinstance(module, ParamWrapper):
        return update if module._did_swap_in_out_features or update.ndim == 2 else update.mT
    if adapter in module.lora_embedding_A:
        return update.T
    A: Tensor = module.lora_A[adapter].weight
    if A.ndim > 2:
        return update.reshape(-1, *A.shape[1:])
    return transpose(update, getattr(module, "fan_in_fan_out", False))


def grown(trained: Tensor, more: Tensor, dim: int, experts: int) -> Tensor:
    """lora_A with further rows (``dim`` 0), or lora_B with further columns (1), given as a matrix."""
    as_them, like_them = ((as_rows, like_lora_a), (as_columns, like_lora_b))[dim]
    wide = torch.promote_types(trained.dtype, more.dtype)
    whole = torch.cat([as_them(trained, experts).to(wide), more.to(trained.device, wide)], dim)
    return like_them(whole, trained, experts)
