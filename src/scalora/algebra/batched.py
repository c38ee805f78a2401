"""Factorisations of many small matrices, of several stacks in one call where their sizes agree.

A GPU waits for the host in each call, and a library's QR factorisation launches a score of kernels for each matrix of a
batch. What takes products and Cholesky factors of k×k matrices only is a handful for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..common.shapes import Float

_SHIFT = {torch.float32: 1.2e-7, torch.float64: 1e-13}  # of a matrix's norm: hardly more than is rounding in it
_TINY = 1e-30  # in place of a norm of 0
_BATCHED = 32  # order of the largest matrices that cuSOLVER solves many of in one launch
_SINGLY = 128  # order from which one after the other is no worse, by counting
_SWEEPS = 7  # what is left beside the diagonal is hardly more than rounding, in all that was tried
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


def orthonormal(stacks: Sequence[Tensor], towards: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Orthonormal bases, float64, of the columns of X + ε‖X‖Φ, which are never dependent; each (…, n, k), k ≤ n.

    Args:
        stacks: X, float32 or float64.
        towards: Φ, orthonormal columns: where X has no direction the basis takes one from there. Left out, they are
            the first columns of the identity.

    Source: shifted Cholesky QR (Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa, SIAM J. Sci. Comput. 42, 2020),
    and the shift of Nyström's approximation (Martinsson and Tropp, Acta Numerica 29, 2020, 14.4).
    """
    towards = [torch.eye(*X.shape[-2:], dtype=X.dtype, device=X.device) for X in stacks] if towards is None else towards
    norms = (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(_TINY) for X in stacks)
    bases = [
        torch.addcmul(X, Phi, norm, value=_SHIFT[X.dtype]).double()
        for X, Phi, norm in zip(stacks, towards, norms, strict=True)
    ]
    for _ in range(3):  # the second and third time for what rounding has left
        inverses = together(_inverse_factor, [Q.mT @ Q for Q in bases])
        bases = [Q @ inverse.mT for Q, (inverse,) in zip(bases, inverses, strict=True)]
    return bases


def _inverse_factor(gram: Tensor) -> tuple[Tensor]:
    """L⁻¹ of gram + ridge = L Lᵀ."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    factor: Tensor = torch.linalg.cholesky_ex(torch.addcmul(gram, eye, trace, value=_RIDGE))[0]  # pyright: ignore
    return (torch.linalg.solve_triangular(factor, eye, upper=False),)


def eigh(S: Float[Tensor, "*batch k k"]) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch k k"]]:
    """Eigenvalues, ascending, and eigenvectors of symmetric, positive semi-definite matrices."""
    if S.is_cpu or S.ndim == 2 or not _BATCHED < S.shape[-1] < _SINGLY:
        w, V = torch.linalg.eigh(S)
        return w, V
    w, V = block_jacobi(S.flatten(0, -3))
    return w.view(S.shape[:-1]), V.view(S.shape)


def block_jacobi(S: Float[Tensor, "L k k"]) -> tuple[Float[Tensor, "L k"], Float[Tensor, "L k k"]]:
    """As :func:`eigh`, from matrices of an order that torch solves by the batch on a GPU: larger ones it takes singly.

    To be dropped once it does not (pytorch/pytorch#174674, open in torch 2.13).

    Blocks of half that size meet in pairs, all pairs once a sweep as in a tournament; those that play at one time are
    solved at once, and whole matrices turned by what was found (Golub and Van Loan, Matrix Computations, 8.5.6).
    """
    L, k, _ = S.shape
    more = -k % _BATCHED
    pairs = (k + more) // _BATCHED
    rows, turn = torch.nn.functional.pad(S, (0, more, 0, more)), _next_round(2 * pairs, S.device)
    # What is only there to fill the last pair lies below all eigenvalues, and mixes with none.
    low = S.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) + torch.finfo(S.dtype).tiny
    rows.diagonal(dim1=-2, dim2=-1)[:, k:] = -low
    vectors = torch.eye(k + more, dtype=S.dtype, device=S.device).expand(L, -1, -1)
    for _ in range(_SWEEPS):
        # By falling size, or spread eigenvalues take twice the sweeps.
        order = rows.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
        rows = rows.gather(1, order[..., None].expand_as(rows)).gather(2, order[:, None].expand_as(rows))
        vectors = vectors.gather(1, order[..., None].expand_as(vectors))
        for _ in range(2 * pairs - 1):
            blocks = rows.view(L, pairs, _BATCHED, pairs, _BATCHED).diagonal(dim1=1, dim2=3).movedim(-1, 1)
            Qt = _by_block(torch.linalg.eigh(blocks)[1])
            left = (Qt @ rows.view(L, pairs, _BATCHED, -1)).view(L, k + more, -1)
            right = (Qt @ left.mT.index_select(-1, turn).view(L, pairs, _BATCHED, -1)).view(L, k + more, -1)
            rows = right.index_select(1, turn)
            vectors = (Qt @ vectors.reshape(L, pairs, _BATCHED, -1)).view(L, k + more, -1).index_select(1, turn)
    w, order = rows.diagonal(dim1=-2, dim2=-1).sort()
    return w[:, more:], vectors.gather(1, order[..., None].expand_as(vectors))[:, more:, :k].mT


def _by_block(V: Tensor) -> Tensor:
    """Eigenvectors as rows, each with the block that most of it is in: if sorted, some blocks would never meet."""
    order = V[..., : _BATCHED // 2, :].square().sum(-2).argsort(-1, descending=True)
    return V.mT.gather(-2, order[..., None].expand_as(V))


@lru_cache
def _next_round(blocks: int, device: torch.device) -> Tensor:
    """Where rows come from in the next round: the first block stays, all others move on by one place."""
    half = _BATCHED // 2
    places = [0, *range(2, blocks, 2), *range(blocks - 1, 0, -2)]  # round the table: the upper row, then the lower
    before = dict(zip(places[1:], [places[-1], *places[1:-1]], strict=True)) | {0: 0}
    return torch.tensor([half * before[i] + j for i in range(blocks) for j in range(half)], device=device)
