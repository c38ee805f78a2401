"""LoRA-Muon: its steps by its definition, decay of the product, half of Adam's state, AdamW for the head."""

import math

import pytest
import torch

from helpers import models, pairs, training
from scalora import ScaloraError
from scalora.layers.peft_lora import find_layers
from scalora.methods.lora_muon import LoraMuonOptimizer
from scalora.runs.training import set_head_rate


def _polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def _setting(kind, decay=0.0, **options):
    model, arguments = models.lora(kind), pairs.arguments(learning_rate=0.01, weight_decay=decay)
    layers = find_layers(model)
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model, layers, LoraMuonOptimizer(model, arguments, **options)


@pytest.mark.parametrize("decay", [0.0, 20.0])
def test_three_steps_by_the_definition(decay):
    model, layers, optimizer = _setting("llama", decay)
    means, q = {}, math.sqrt(1 - 0.01 * decay)
    for step in range(3):
        optimizer.zero_grad()
        model(**models.batch("llama", step)).loss.backward()
        expected = {}
        for layer in layers:
            A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
            M_A, M_B = (
                0.95 * means.get(p, torch.zeros_like(p)) + 0.05 * p.grad.double() for p in (layer.lora_A, layer.lora_B)
            )
            means[layer.lora_A], means[layer.lora_B] = M_A, M_B
            damping = 1e-5 * torch.eye(4)
            gram_A, gram_B = A @ A.T, B.T @ B
            e, V = torch.linalg.eigh(gram_A + gram_A.norm() * damping)
            R_A = (V * e.rsqrt()) @ V.T
            e, V = torch.linalg.eigh(gram_B + gram_B.norm() * damping)
            R_B = (V * e.rsqrt()) @ V.T
            half = 0.01 / (2 * layer.scale)
            expected[layer.lora_B] = q * B - half / q * _polar(M_B @ R_A) @ R_A
            expected[layer.lora_A] = q * A - half / q * (_polar(M_A.T @ R_B) @ R_B).T
        optimizer.step()
        for p, value in expected.items():
            torch.testing.assert_close(p.detach().double(), value, rtol=0, atol=1e-5)


def test_one_step_moves_each_layer_by_the_rate_along_its_gradient():
    model, layers, optimizer = _setting("llama")
    model(**models.batch("llama")).loss.backward()
    before = [layer.scale * layer.lora_B.detach() @ layer.lora_A.detach() for layer in layers]
    optimizer.step()
    for layer, old in zip(layers, before, strict=True):
        moved = layer.scale * layer.lora_B.detach() @ layer.lora_A.detach() - old
        assert 0.0045 < float(torch.linalg.matrix_norm(moved, 2)) < 0.0105  # half from each factor, or both as one


def test_only_the_product_decays_where_there_is_no_gradient_to_speak_of():
    _, layers, optimizer = _setting("llama", decay=10.0)
    before = [layer.lora_B.detach() @ layer.lora_A.detach() for layer in layers]
    for layer in layers:
        layer.lora_A.grad, layer.lora_B.grad = torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B)
    layers[0].lora_A.grad = None
    optimizer.step()
    for index, (layer, old) in enumerate(zip(layers, before, strict=True)):
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, old * (1 if index == 0 else 0.9))


def test_it_keeps_half_of_adams_state_and_the_head_steps_as_adamws(tmp_path):
    settings = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_epsilon": 1e-6, "lr_scheduler_type": "linear"}
    adapted = training.adapt("lora-muon", "bert", tmp_path / "base")
    made = training.trainer(adapted, "bert", tmp_path / "out", max_steps=1, **settings)
    start = {n: p.detach().clone() for n, p in adapted.model.named_parameters()}
    plain = training.adapt("lora", "bert", tmp_path / "base")
    other = training.trainer(plain, "bert", tmp_path / "other", max_steps=1, **settings)
    made.train()
    other.train()
    theirs = dict(plain.model.named_parameters())
    for name, p in adapted.model.named_parameters():
        state = made.optimizer.state.get(p, {})
        if "lora_" in name:
            assert sum(value.numel() for value in state.values()) == p.numel()
        elif p.requires_grad:
            assert "classifier" in name
            assert not torch.equal(p, start[name])
            torch.testing.assert_close(p, theirs[name])  # the same gradient: the adapters of both began alike


def test_under_autocast_and_a_schedule_it_learns(tmp_path):
    adapted = training.adapt("lora-muon", "bert", tmp_path / "base", options={"momentum": 0.5})
    made = training.trainer(
        adapted, "bert", tmp_path / "out", bf16=True, learning_rate=0.03, lr_scheduler_type="linear"
    )
    made.train()
    losses = training.losses(made)
    assert losses[-1] < losses[0]
    assert all(group["lr"] == 0 for group in made.optimizer.param_groups)


def test_a_rate_of_its_own_for_the_head(tmp_path):
    adapted = training.adapt("lora-muon", "bert", tmp_path / "base")
    made = training.trainer(adapted, "bert", tmp_path / "out", learning_rate=0.1, weight_decay=0.1)
    set_head_rate(made.create_optimizer(), adapted.model, ["classifier"], 1e-3)
    start = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if p.requires_grad}
    made.train()
    for name, p in adapted.model.named_parameters():
        if "classifier.modules_to_save" in name:
            assert 0 < (p - start[name]).abs().max() < 6.1e-3  # six of AdamW's steps
    assert len(made.optimizer.param_groups) == 3


def test_alpha_changes_nothing_but_what_is_clipped(tmp_path):
    found = []
    for alpha in (4.0, 32.0):
        adapted = training.adapt("lora-muon", "llama", tmp_path / "base", alpha=alpha)
        training.trainer(
            adapted, "llama", tmp_path / "out", learning_rate=0.1, weight_decay=0.5, max_grad_norm=0
        ).train()
        found.append(models.logits(adapted.model, "llama"))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_a_decay_that_shrinks_the_update_to_nothing_is_refused(tmp_path):
    adapted = training.adapt("lora-muon", "llama", tmp_path / "base")
    with pytest.raises(ScaloraError, match=r"training\.weight_decay.*below 1"):
        training.trainer(adapted, "llama", tmp_path / "out", weight_decay=200, learning_rate=0.01)
