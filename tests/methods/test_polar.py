"""PoLAR: B Θ A from start to export, and the landing field in the place of two gradients."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import models, training
from scalora.layers.peft_lora import find_layers
from scalora.methods.polar import directions_of


def _theta(layer):
    return layer.module.lora_B[layer.adapter].parametrizations.weight[0].theta


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_it_starts_orthonormal_with_the_bases_function(kind, tmp_path):
    base = training.base(kind, tmp_path / "base")
    adapted = training.adapt("polar", kind, tmp_path / "base")
    for layer in find_layers(adapted.model):
        B, A = directions_of(layer)
        assert (B.shape[1], A.shape[0], tuple(_theta(layer).shape)) == (4, 4, (4, 4))
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-5)
        assert not _theta(layer).any()
        assert all(p.requires_grad for p in (B, A, _theta(layer)))
    if kind != "bert":  # whose head starts at random elsewhere
        assert torch.equal(models.logits(adapted.model, kind), models.logits(base, kind))


def test_the_function_is_w_plus_s_b_theta_a(tmp_path):
    adapted = training.adapt("polar", "llama", tmp_path / "base", alpha=12.0)
    layer = find_layers(adapted.model)[0]
    torch.nn.init.normal_(_theta(layer))
    x = torch.randn(3, 5, layer.lora_A.shape[1])
    (B, A), W = directions_of(layer), layer.base_weight
    with torch.no_grad():
        expected = x @ (W + 3 * B @ _theta(layer) @ A).T
        torch.testing.assert_close(layer.module(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_become_the_landing_field_and_thetas_stays(tmp_path):
    adapted = training.adapt("polar", "llama", tmp_path / "base", options={"penalty": 0.5})
    seen = {"clipped": [], "stepped": []}
    layer = find_layers(adapted.model)[0]

    def gradients():
        return [p.grad.clone() for p in (*directions_of(layer), _theta(layer))]

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer.optimizer.register_step_pre_hook(lambda *_: seen["stepped"].append(gradients()))

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen["clipped"].append([p.detach().clone() for p in directions_of(layer)] + gradients())

    training.trainer(adapted, "llama", tmp_path / "out", callbacks=[Watch()], learning_rate=5e-3).train()
    for (B, A, of_B, of_A, of_theta), stepped in zip(seen["clipped"], seen["stepped"], strict=True):
        for X, gradient, found in ((B, of_B, stepped[0]), (A.T, of_A.T, stepped[1].T)):
            skew = gradient @ X.T - X @ gradient.T  # n×n, as published
            expected = skew @ X + 0.5 * X @ (X.T @ X - torch.eye(4))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(stepped[2], of_theta)
    assert seen["clipped"][0][4].any()  # Θ moves at once, B and A follow
    assert not seen["clipped"][0][2].any()
    assert seen["clipped"][1][2].any()


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_it_is_saved_as_the_plain_lora_that_it_is(kind, tmp_path):
    adapted = training.adapt("polar", kind, tmp_path / "base")
    training.trainer(adapted, kind, tmp_path / "out", learning_rate=5e-3).train()
    after = models.logits(adapted.model, kind)
    adapted.save(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [name for name in state if "theta" in name or "parametrizations" in name]
    for layer in find_layers(adapted.model):
        B, A = directions_of(layer)
        (saved_A,) = [v for k, v in state.items() if k.endswith(f"{layer.name}.lora_A.weight")]
        (saved_B,) = [v for k, v in state.items() if k.endswith(f"{layer.name}.lora_B.weight")]
        assert torch.equal(saved_A, A)
        assert torch.equal(saved_B, layer.scale * (B @ _theta(layer)))
    loaded = PeftModel.from_pretrained(training.base(kind, tmp_path / "base"), str(tmp_path / "adapter"))
    torch.testing.assert_close(models.logits(loaded, kind), after, rtol=0, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(models.logits(merged, kind), after, rtol=0, atol=1e-5)


def test_peft_itself_merges_it_exactly(tmp_path):
    adapted = training.adapt("polar", "llama", tmp_path / "base")
    training.trainer(adapted, "llama", tmp_path / "out", learning_rate=5e-3).train()
    after = models.logits(adapted.model, "llama")
    torch.testing.assert_close(models.logits(adapted.model.merge_and_unload(), "llama"), after, rtol=0, atol=1e-5)


def test_the_best_checkpoint_comes_back_whole(tmp_path):
    adapted = training.adapt("polar", "llama", tmp_path / "base")
    made = training.trainer(adapted, "llama", tmp_path / "out", save_strategy="steps", save_steps=3, learning_rate=5e-3)
    made.train()
    last = [p.detach().clone() for p in models.trainable(adapted.model)]
    made.state.best_model_checkpoint = str(tmp_path / "out" / "checkpoint-6")
    torch.nn.init.zeros_(_theta(find_layers(adapted.model)[0]))
    made._load_best_model()
    assert all(map(torch.equal, last, models.trainable(adapted.model)))


def test_under_autocast_theta_is_multiplied_in_full(tmp_path):
    adapted = training.adapt("polar", "llama", tmp_path / "base")
    layer = find_layers(adapted.model)[0]
    torch.nn.init.normal_(_theta(layer))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.lora_B
    assert torch.equal(weight, layer.lora_B)
    training.trainer(adapted, "llama", tmp_path / "out", bf16=True, learning_rate=5e-3).train()
    assert {p.dtype for p in models.trainable(adapted.model)} == {torch.float32}


@pytest.mark.parametrize("retract", [False, True])
def test_retracted_they_stay_orthonormal(retract, tmp_path):
    adapted = training.adapt("polar", "llama", tmp_path / "base", options={"retract": retract})
    training.trainer(adapted, "llama", tmp_path / "out", learning_rate=2e-2).train()
    drifts = []
    for layer in find_layers(adapted.model):
        B, A = directions_of(layer)
        drifts += [(X @ X.T - torch.eye(4)).abs().max().item() for X in (B.T, A)]
    assert max(drifts) < 1e-5 if retract else min(drifts) > 1e-3
