"""What sketches ask of the inputs X of a layer, T rows of n: XM, XᵀY and the rows' squared norms.

A row is one output's share of the input: of a linear layer its vector, of an embedding the token that it looks up, as a
unit vector, of a convolution the patch that it sees. The latter two are never written out.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .layout import CONVOLUTIONS, like_lora_a


class Reading(Protocol):
    """How a layer reads its input x."""

    def rows(self, outputs: Tensor) -> Tensor:
        """Outputs, or gradients of them, as (T, m)."""
        ...

    def times(self, x: Tensor, M: Tensor) -> Tensor:
        """XM, (T, k), of M (n, k)."""
        ...

    def transposed(self, x: Tensor, Y: Tensor) -> Tensor:
        """XᵀY, (n, k), of Y (T, k)."""
        ...

    def squares(self, x: Tensor, like: Tensor) -> Tensor:
        """Squared norms of the rows of X, (T, 1), in the dtype of ``like``."""
        ...


class _Rows(NamedTuple):
    def rows(self, outputs: Tensor) -> Tensor:
        return outputs.flatten(0, -2)

    def times(self, x: Tensor, M: Tensor) -> Tensor:
        return self.rows(x).to(M) @ M

    def transposed(self, x: Tensor, Y: Tensor) -> Tensor:
        return self.rows(x).to(Y).mT @ Y

    def squares(self, x: Tensor, like: Tensor) -> Tensor:
        return self.rows(x).to(like).square().sum(-1, keepdim=True)


LINEAR = _Rows()  # of a linear layer


def reading(module: LoraLayer) -> Reading:
    """That of a layer."""
    if len(module.lora_embedding_A):
        base, scale = _embedding(module), module._get_embed_scale()
        return _Tokens(base.num_embeddings, 1.0 if scale is None else scale, base.padding_idx)
    first = next(iter(module.lora_A.values()), None)
    return _Patches(first) if isinstance(first, CONVOLUTIONS) else LINEAR


def _embedding(module: LoraLayer) -> nn.Embedding:
    base = module.get_base_layer()
    assert isinstance(base, nn.Embedding)
    return base


class _Tokens(NamedTuple):
    size: int
    scale: Tensor | float  # of what the embedding gives
    padding: int | None  # has no gradient

    def rows(self, outputs: Tensor) -> Tensor:
        return outputs.flatten(0, -2)

    def times(self, x: Tensor, M: Tensor) -> Tensor:
        return M[x.flatten()] * self._weights(x, M)

    def transposed(self, x: Tensor, Y: Tensor) -> Tensor:
        Y = Y.to(torch.promote_types(Y.dtype, torch.float32))  # a token may come a thousand times
        return Y.new_zeros(self.size, Y.shape[1]).index_add_(0, x.flatten(), Y * self._weights(x, Y))

    def squares(self, x: Tensor, like: Tensor) -> Tensor:
        return self._weights(x, like).square()

    def _weights(self, x: Tensor, like: Tensor) -> Tensor:
        there = torch.ones_like(x) if self.padding is None else x != self.padding
        return there.flatten()[:, None].to(like) * self.scale


class _Patches(NamedTuple):
    lora_A: nn.Module

    def rows(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(1, -1).flatten(0, -2)

    def times(self, x: Tensor, M: Tensor) -> Tensor:
        return self.rows(self._see(x.to(M), M.mT))

    def transposed(self, x: Tensor, Y: Tensor) -> Tensor:
        with torch.enable_grad():  # the gradient of a convolution's weight
            Mt = Y.new_zeros(Y.shape[1], self._weight[0].numel(), requires_grad=True)
            seen = self.rows(self._see(x.detach().to(Y), Mt))
            return torch.autograd.grad(seen, Mt, Y)[0].mT

    def squares(self, x: Tensor, like: Tensor) -> Tensor:
        return self.rows(self._see(x.to(like).square(), like.new_ones(1, self._weight[0].numel())))

    def _see(self, x: Tensor, Mt: Tensor) -> Tensor:
        return self.lora_A._conv_forward(x, like_lora_a(Mt, self._weight), None)  # pyright: ignore

    @property
    def _weight(self) -> Tensor:
        return self.lora_A.weight  # pyright: ignore
