"""MoRA against its definition, block by block and angle by angle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers import models, training
from scalora.methods.mora import MoraLinear
from scalora.methods.support.wrappers import merge

sizes = st.integers(1, 40)


def definition(x, M, m, kind):
    """Δh of one input vector x (n,), written down as the paper does: compress, M, decompress."""
    n, size = len(x), len(M)
    blocks = [[float(x[(i * size + j) % n]) for j in range(size)] for i in range(math.ceil(n / size))]
    if kind == 1:
        h = (M @ torch.tensor([sum(column) for column in zip(*blocks, strict=True)], dtype=M.dtype)).tolist()
    else:
        h = []
        for i, block in enumerate(blocks):
            half = size // 2
            turned = torch.zeros(size, dtype=M.dtype)
            for k in range(half):  # the plane of coordinates k and k + half is turned by i·10000^(−2k/size)
                angle = i * 10000 ** (-2 * k / size)
                a, b = block[k], block[k + half]
                turned[k] = a * math.cos(angle) - b * math.sin(angle)
                turned[k + half] = b * math.cos(angle) + a * math.sin(angle)
            h += (M @ turned).tolist()
    return torch.tensor([h[j % len(h)] for j in range(m)], dtype=M.dtype)


@given(m=sizes, n=sizes, rank=st.integers(1, 6), kind=st.sampled_from([1, 6]), seed=st.integers(0, 99))
def test_the_update_is_the_definition(m, n, rank, kind, seed):
    torch.manual_seed(seed)
    layer = MoraLinear(nn.Linear(n, m), rank, kind).double()
    nn.init.normal_(layer.M)
    x = torch.randn(n, dtype=torch.float64)
    # the angles are float32
    torch.testing.assert_close(layer.update(x), definition(x, layer.M.detach(), m, kind), rtol=1e-5, atol=1e-5)


@given(m=sizes, n=sizes, rank=st.integers(1, 6), kind=st.sampled_from([1, 6]), bias=st.booleans())
def test_merging_is_exact(m, n, rank, kind, bias):
    torch.manual_seed(m * n + rank)
    model = nn.Sequential(MoraLinear(nn.Linear(n, m, bias=bias), rank, kind))
    nn.init.normal_(model[0].M)
    x = torch.randn(2, 3, n)
    before = model(x)
    merge(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-4)


@given(m=st.integers(8, 500), n=st.integers(8, 500), rank=st.integers(1, 8))
def test_it_has_loras_number_of_parameters(m, n, rank):
    base = nn.Linear(n, m, device="meta")
    for kind in (1, 6):
        count = MoraLinear(base, rank, kind).M.numel()
        size = math.isqrt(count)
        assert abs(size - math.sqrt((m + n) * rank)) <= (0.5 if kind == 1 else 1.5)
        assert kind == 1 or size % 2 == 0


@pytest.mark.parametrize("type", [1, 6])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_trained_merged_and_saved(kind, type, tmp_path):
    adapted = training.adapt("mora", kind, tmp_path / "base", options={"type": type})
    training.trainer(adapted, kind, tmp_path / "out", learning_rate=5e-3).train()
    after = models.logits(adapted.model, kind)
    loaded = training.run_lines(adapted.save(tmp_path / "adapter"))
    assert torch.equal(models.logits(loaded, kind), after)
    merged = merge(adapted.model)
    assert not any(isinstance(module, MoraLinear) for module in merged.modules())
    torch.testing.assert_close(models.logits(merged, kind), after, rtol=0, atol=1e-5)


def test_dropout_is_off_in_evaluation():
    layer = MoraLinear(nn.Linear(6, 6), 2, 6, dropout=0.5)
    nn.init.normal_(layer.M)
    x = torch.randn(4, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_bfloat16_base_keeps_float32_matrices_and_its_own_dtype(tmp_path):
    adapted = training.method("mora").adapt(models.base("llama", torch.bfloat16), "causal-lm")
    layer = next(module for module in adapted.model.modules() if isinstance(module, MoraLinear))
    assert layer.M.dtype == torch.float32
    assert adapted.model(**models.batch("llama")).logits.dtype == torch.bfloat16
