"""A sketch of a layer's gradient, against the gradient itself."""

import pytest
import torch
from torch import nn

from scalora.layers.gradient_sketch import GradientSketch, gather_sketch


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_leaf_gets_the_product_with_the_gradient_and_nothing_else_changes(side):
    m, n, k = 7, 5, 3
    W = torch.randn(m, n, dtype=torch.float64, requires_grad=True)
    basis = torch.randn(n if side == "left" else m, k, dtype=torch.float64)
    leaf = torch.zeros((m, k) if side == "left" else (k, n), dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # micro-batches add up
        x = torch.randn(2, 4, n, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(2, 4, m, dtype=torch.float64)
        plain = nn.functional.linear(x, W)
        out = gather_sketch(plain, x, GradientSketch(side, basis, leaf))
        assert torch.equal(out, plain)
        before = None if x.grad is None else x.grad.clone()
        (out * weights).sum().backward()
        assert before is None
        torch.testing.assert_close(x.grad, weights @ W.detach())
    wanted = W.grad @ basis if side == "left" else (W.grad.mT @ basis).mT
    torch.testing.assert_close(leaf.grad, wanted)


def test_in_half_precision_the_leaf_keeps_its_own():
    leaf = torch.zeros(6, 2, requires_grad=True)
    x = torch.randn(9, 4, dtype=torch.bfloat16)
    result = torch.randn(9, 6, dtype=torch.bfloat16, requires_grad=True)
    gather_sketch(result, x, GradientSketch("left", torch.randn(4, 2), leaf)).sum().backward()
    assert leaf.grad.dtype == torch.float32
