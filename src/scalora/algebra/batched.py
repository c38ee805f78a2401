"""Factorisations of many small matrices, of several stacks in one call where their sizes agree.

A GPU waits for the host in each call, and a library's QR factorisation launches a score of kernels for each matrix of a
batch. What takes products and Cholesky factors of k×k matrices only is a handful for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_SHIFT = torch.finfo(torch.float32).eps  # of a matrix's norm: what float32 leaves unknown of it anyway
_TINY = 1e-30  # in place of a norm of 0
_RIDGE = 1e-15  # of a Gram matrix's trace: more than float64's rounding takes from its eigenvalues


def together(function: Callable[[Tensor], tuple[Tensor, ...]], stacks: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """``function`` of each stack (L, …), called once for all of one shape, dtype and device but for L.

    Args:
        function: takes (L, …) and gives tensors whose first dimension is L, each matrix by itself.
        stacks: of any sizes.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, stack in enumerate(stacks):
        alike[stack.shape[1:], stack.dtype, stack.device].append(i)
    found: list[tuple[Tensor, ...]] = [()] * len(stacks)
    for members in alike.values():
        if len(members) == 1:
            found[members[0]] = tuple(function(stacks[members[0]]))
            continue
        sizes = [len(stacks[i]) for i in members]
        parts = [part.split(sizes) for part in function(torch.cat([stacks[i] for i in members]))]
        for i, *own in zip(members, *parts, strict=True):
            found[i] = tuple(own)
    return found


def orthonormal(stacks: Sequence[Tensor], towards: Sequence[Tensor]) -> list[Tensor]:
    """Orthonormal bases, float64, of the columns of X + ε‖X‖Φ, which are never dependent; each (L, n, k), k ≤ n.

    Args:
        stacks: X, with ΦᵀX positive semi-definite up to rounding: products of such matrices with Φ.
        towards: Φ, orthonormal columns. Where X has no direction the basis takes one from there.

    Source: shifted Cholesky QR (Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa, SIAM J. Sci. Comput. 42, 2020),
    and the shift of Nyström's approximation (Martinsson and Tropp, Acta Numerica 29, 2020, 14.4).
    """
    norms = (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(_TINY) for X in stacks)
    bases = [
        torch.addcmul(X, Phi, norm, value=_SHIFT).double() for X, Phi, norm in zip(stacks, towards, norms, strict=True)
    ]
    for _ in range(2):  # the second time for what rounding has left
        inverses = together(_inverse_factor, [Q.mT @ Q for Q in bases])
        bases = [Q @ inverse.mT for Q, (inverse,) in zip(bases, inverses, strict=True)]
    return bases


def _inverse_factor(gram: Tensor) -> tuple[Tensor]:
    """L⁻¹ of gram + ridge = L Lᵀ."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    factor: Tensor = torch.linalg.cholesky_ex(torch.addcmul(gram, eye, trace, value=_RIDGE))[0]  # pyright: ignore
    return (torch.linalg.solve_triangular(factor, eye, upper=False),)


def eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (…, k), ascending, and eigenvectors (…, k, k) of symmetric matrices."""
    w, V = torch.linalg.eigh(S)
    return w, V
