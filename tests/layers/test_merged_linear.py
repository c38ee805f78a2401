"""Adapters added to the weight: the definition, what waits for backward, and when it steps aside."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import scalora
from helpers import models
from scalora.layers import lora_forward as fused
from scalora.layers.lora_forward import LoraForward
from scalora.layers.products import Adapter, frozen_weight, merged_linear, merging_is_cheaper


@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    trained=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=3),
    shape=st.sampled_from([(3,), (2, 4), (1, 2, 3)]),
    biased=st.booleans(),
    inner=st.booleans(),
)
def test_it_is_the_definition(ranks, trained, shape, biased, inner):
    m, n = 7, 5
    W, bias = torch.randn(m, n).double(), torch.randn(m).double().requires_grad_() if biased else None
    adapters = [
        Adapter(torch.randn(r, n).double().requires_grad_(A), torch.randn(m, r).double().requires_grad_(B), 0.5 + i)
        for i, (r, (A, B)) in enumerate(zip(ranks, trained, strict=False))
    ]
    x = torch.randn(*shape, n).double().requires_grad_(inner)
    wanted = nn.functional.linear(x, W, bias)
    for A, B, scale, _ in adapters:
        wanted = wanted + scale * (x @ A.mT) @ B.mT
    found = merged_linear(x, W, bias, adapters)
    torch.testing.assert_close(found, wanted)
    leaves = [x, bias, *(matrix for each in adapters for matrix in each[:2])]
    leaves = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if leaves:
        weights = torch.randn_like(wanted)
        gradients = [torch.autograd.grad((out * weights).sum(), leaves) for out in (found, wanted)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_computes_what_it_computes_without(kind, autocast, monkeypatch):
    model = models.lora(kind)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    scalora.attach(model, optimizer, scalora.ScaLoraConfig(interval=1, keep_sums=False))
    models.train(model, optimizer, kind, 3)
    outcomes = []
    merged = []
    monkeypatch.setattr(fused, "merged_linear", lambda *a: merged.append(1) or merged_linear(*a))
    for way in (False, True):
        monkeypatch.setattr(fused, "merging_is_cheaper", lambda x, W, way=way: way)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**models.batch(kind))
        output.loss.backward()
        outcomes.append([output.logits.float(), *(p.grad for p in models.trainable(model))])
    assert len(merged) == sum(isinstance(module, LoraForward) for module in model.modules())
    tolerance = 0.05 if autocast else 1e-5
    for thin, thick in zip(*outcomes, strict=True):
        assert (thin - thick).norm() <= tolerance * thin.norm() + 1e-9


def test_in_bf16_it_is_about_as_near_to_the_truth(monkeypatch):
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, scalora.ScaLoraConfig(interval=1))
    models.train(model, optimizer, "llama", 3)
    handle.detach()
    exact = copy.deepcopy(model).double()
    errors = {True: 0.0, False: 0.0}
    for seed in range(10):
        truth = exact(**models.batch("llama", seed)).logits
        for way in errors:
            monkeypatch.setattr(fused, "merging_is_cheaper", lambda x, W, way=way: way)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                errors[way] += float((model(**models.batch("llama", seed)).logits - truth).norm())
    assert errors[True] <= 1.15 * errors[False]


@pytest.mark.parametrize(("dtype", "waiting"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_no_more_weights_wait_for_backward_than_without_adapters(dtype, waiting):
    """W itself; and under autocast what an ordinary layer keeps too, a copy of W in the activations' dtype."""
    W, bias = torch.randn(64, 32), torch.randn(64)
    adapter = Adapter(torch.randn(4, 32), torch.randn(64, 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        merged_linear(torch.randn(500, 32, dtype=dtype, requires_grad=True), W, bias, [adapter])
    weights = [t for t in kept if t.numel() >= W.numel()]
    assert len(weights) == waiting
    assert weights[0].data_ptr() == W.data_ptr()
    assert weights[-1].dtype == dtype


def test_many_tokens_make_it_pay():
    W = torch.empty(384, 384)
    assert merging_is_cheaper(torch.empty(16, 64, 384), W)
    assert not merging_is_cheaper(torch.empty(1, 1, 384), W)
    # 240 tokens: 1.25 times the weight's size. Under autocast the sum is formed once, else a second time for backward.
    assert merging_is_cheaper(torch.empty(240, 384, dtype=torch.bfloat16), W)
    assert not merging_is_cheaper(torch.empty(240, 384), W)


@pytest.mark.parametrize(
    "case", ["forward hook", "pre-hook", "backward hook", "own forward", "trained", "half", "other"]
)
def test_the_weight_is_left_alone_where_that_would_differ(case):
    base = nn.Linear(5, 7).requires_grad_(case == "trained")
    x = torch.randn(3, 5)
    if case == "forward hook":
        base.register_forward_hook(lambda *_: None)
    if case == "pre-hook":
        base.register_forward_pre_hook(lambda *_: None)
    if case == "backward hook":
        base.register_full_backward_hook(lambda *_: None)
    if case == "own forward":  # as accelerate's offloading does it
        base.forward = lambda x: x
    if case == "half":
        base, x = base.bfloat16(), x.bfloat16()
    if case == "other":
        base = nn.Bilinear(5, 5, 7)
    assert frozen_weight(base, x) is None


def test_the_weight_of_a_conv1d_lies_the_other_way():
    base = Conv1D(7, 5).requires_grad_(False)
    W = frozen_weight(base, torch.randn(3, 5))
    assert W is not None
    assert W.shape == (7, 5)
