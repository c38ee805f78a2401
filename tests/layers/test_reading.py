"""Sketches of embeddings and convolutions, against the inputs' rows written out and the weight's own gradient."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from scalora.layers.gradient_sketch import GradientSketch, gather_sketch
from scalora.layers.moment_sketch import MomentSketch, gather_moments
from scalora.layers.peft_lora import sort_layers
from scalora.layers.reading import reading


class _Scaled(nn.Embedding):
    """As Gemma's."""

    embed_scale = 3.0

    def forward(self, input):
        return super().forward(input) * self.embed_scale


LAYERS = {
    "embedding": (nn.Embedding(11, 6, padding_idx=2), lambda: torch.randint(0, 11, (3, 7))),
    "embedding-scaled": (_Scaled(11, 6), lambda: torch.randint(0, 11, (3, 7))),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 9).double()),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), lambda: torch.randn(2, 4, 8, 7).double()),
    "conv2d-same": (nn.Conv2d(4, 6, 3, padding="same"), lambda: torch.randn(2, 4, 5, 5).double()),
    "conv3d": (nn.Conv3d(2, 6, 2), lambda: torch.randn(2, 2, 3, 4, 5).double()),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """The layer, its input, its output's gradient, and the rows of its input written out."""
    plain, inputs = LAYERS[request.param]
    torch.manual_seed(3)
    model = get_peft_model(nn.Sequential(plain.double()), LoraConfig(r=2, target_modules=["0"])).double()
    ((layer,), _), x = sort_layers(model), inputs()
    reads = reading(layer.module)
    X = reads.times(x, torch.eye(layer.shape[1]).double())
    return layer, x, reads, X


def test_rows_give_the_weights_gradient(case):
    layer, x, reads, X = case
    layer.base.weight.requires_grad_()
    out = layer.base(x)
    g = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, layer.base.weight, g)
    wanted = gradient.T if isinstance(layer.base, nn.Embedding) else gradient.flatten(1)
    torch.testing.assert_close(reads.rows(g).T @ X, wanted)
    Y = torch.randn(len(X), 3).double()
    torch.testing.assert_close(reads.transposed(x, Y), X.T @ Y)
    torch.testing.assert_close(reads.squares(x, Y), X.square().sum(1, keepdim=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_gradients_sketch(case, side):
    layer, x, reads, X = case
    (m, n), plain = layer.shape, layer.base(x).detach().requires_grad_()
    basis = torch.randn(n if side == "left" else m, 3).double()
    leaf = torch.zeros((m, 3) if side == "left" else (3, n), dtype=torch.float64, requires_grad=True)
    out = gather_sketch(plain, x, GradientSketch(side, basis, leaf), reads)
    g = torch.randn_like(out)
    out.backward(g)
    G = reads.rows(g).T @ X
    torch.testing.assert_close(leaf.grad, G @ basis if side == "left" else (G.T @ basis).T)
    assert torch.equal(out, plain)
    assert torch.equal(plain.grad, g)


def test_second_moments(case):
    layer, x, reads, X = case
    (m, n), plain = layer.shape, layer.base(x).detach().requires_grad_()
    Phi, Psi = torch.randn(n, 3).double(), torch.randn(m, 3).double()
    leaves = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in (Phi.shape, Psi.shape, ())]
    out = gather_moments(plain, x, MomentSketch(Phi, Psi, *leaves), reads)
    g = torch.randn_like(out)
    out.backward(g)
    Y = reads.rows(g)
    of_x, of_y = X.square().sum(1, keepdim=True), Y.square().sum(1, keepdim=True)
    torch.testing.assert_close(leaves[0].grad, (X * of_y).T @ X @ Phi)
    torch.testing.assert_close(leaves[1].grad, (Y * of_x).T @ Y @ Psi)
    torch.testing.assert_close(leaves[2].grad, (of_x * of_y).sum())
