"""Kernels that compute past our layer: what cannot be seen is detected, and refused or named."""

import warnings

import pytest
import torch
from torch import nn

import scalora
from helpers import models
from helpers.attached import attached
from scalora import ScaloraError

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def _fuse(model):
    """What fused LoRA kernels do (Unsloth's, axolotl's): they read one adapter's matrices past its layer's forward."""
    layer = model.get_submodule(FIRST)

    def fused(x):
        name = layer.active_adapters[0]
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        return layer.base_layer(x) + layer.scaling[name] * (x @ A.T @ B.T)

    layer.forward = fused


def test_a_kernel_that_bypasses_the_layer_is_refused():
    model, optimizer, _ = attached()
    _fuse(model)
    with pytest.raises(ScaloraError, match=f"{FIRST}: its adapter got a gradient without its own forward pass"):
        models.train(model, optimizer, "llama", 1)
    model, optimizer, _ = attached()
    models.train(model, optimizer, "llama", 3)
    _fuse(model)  # in mid-run
    models.logits(model, "llama")
    with pytest.raises(ScaloraError, match="without its own forward pass"):
        models.train(model, optimizer, "llama", 2)
    model = models.lora("llama")
    _fuse(model)
    with pytest.raises(ScaloraError, match="a forward pass that was put into it"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)))


def test_a_kernel_that_reads_the_weight_past_the_layer_is_named():
    """As Mamba's does; the adapter then gets no gradient: it stays zero, and so does what is moved out of it."""
    model, optimizer, handle = attached()
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    mlp.down_proj.forward = None  # not called
    mlp.forward = lambda x: nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    with pytest.warns(
        UserWarning, match=r"without a forward pass in 10 steps.*: base_model\S*layers\.0\.mlp\.down_proj; "
    ):
        models.train(model, optimizer, "llama", 10)
    bypassed = next(layer for layer in handle.layers if layer.name.endswith("layers.0.mlp.down_proj"))
    assert not bypassed.A.any()
    assert not bypassed.accumulated.P.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.train(model, optimizer, "llama", 11)  # said once
