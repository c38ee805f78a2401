"""BaLoRA: a step keeps the function, leaves the matrices balanced, and AdamW's state with them."""

import pytest
import torch
from transformers import TrainerCallback

from helpers import models, training
from scalora import ScaloraError
from scalora.layers.peft_lora import find_layers
from scalora.methods.balora import BaLoraCallback, BaLoraOptions


def _stepped(folder, carry="first", kind="llama", steps=3, make=torch.optim.AdamW, **options):
    """A callback by hand, after plain steps: nothing is balanced yet."""
    adapted = training.adapt("balora", kind, folder / "base")
    callback = BaLoraCallback(adapted.model, BaLoraOptions(carry=carry))
    callback.layers = find_layers(adapted.model)
    parameters = [p for layer in callback.layers for p in (layer.A, layer.Bt)]
    callback.optimizer = make(parameters, lr=1e-2, **options)
    models.train(adapted.model, callback.optimizer, kind, steps)
    return adapted, callback


def _gap(layer):
    """Distance from AAᵀ = BᵀB, relative."""
    inner, outer = layer.Bt @ layer.Bt.T, layer.A.T @ layer.A
    return ((inner - outer).norm() / inner.norm()).item()


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_balancing_keeps_the_function(kind, tmp_path):
    adapted, callback = _stepped(tmp_path, kind=kind)
    before = models.logits(adapted.model, kind)
    assert min(_gap(layer) for layer in callback.layers) > 0.1
    callback._call(callback.after)
    assert max(_gap(layer) for layer in callback.layers) < 1e-5
    torch.testing.assert_close(models.logits(adapted.model, kind), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_every_step_of_a_training_ends_balanced(kind, tmp_path):
    adapted = training.adapt("balora", kind, tmp_path / "base")
    gaps = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gaps.append(max(_gap(layer) for layer in find_layers(adapted.model)))

    training.trainer(adapted, kind, tmp_path / "out", callbacks=[Watch()], learning_rate=5e-3).train()
    assert len(gaps) == 6
    assert max(gaps) < 1e-5


def test_a_first_step_of_rate_zero_does_not_end_learning(tmp_path):
    """With a warm-up from 0 B is still zero after it; the published balance would make both zero, for ever."""
    adapted = training.adapt("balora", "llama", tmp_path / "base")
    training.trainer(
        adapted, "llama", tmp_path / "out", lr_scheduler_type="linear", warmup_steps=2, learning_rate=5e-3
    ).train()
    for layer in find_layers(adapted.model):
        assert layer.A.any()
        assert layer.Bt.any()


def test_first_moments_are_those_of_the_balanced_factors_gradients(tmp_path):
    """Momentum of a gradient G that stays: G B' for A' and GᵀA' for B'."""
    _, callback = _stepped(tmp_path, make=torch.optim.SGD, momentum=0.9)
    layer = callback.layers[0]
    G = torch.randn(layer.A.shape[0], layer.Bt.shape[1])
    with torch.no_grad():
        callback.optimizer.state[layer.A]["momentum_buffer"] = G @ layer.Bt.T
        callback.optimizer.state[layer.Bt]["momentum_buffer"] = (G.T @ layer.A).T
    callback._call(callback.after)
    with torch.no_grad():
        for p, expected in ((layer.A, G @ layer.Bt.T), (layer.Bt, (G.T @ layer.A).T)):
            found = callback.optimizer.state[p]["momentum_buffer"]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("carry", ["none", "first", "both"])
def test_which_moments_move(carry, tmp_path):
    _, callback = _stepped(tmp_path, carry=carry)
    state = callback.optimizer.state[callback.layers[0].A]
    before = {key: value.clone() for key, value in state.items()}
    callback._call(callback.after)
    assert torch.equal(state["exp_avg"], before["exp_avg"]) is (carry == "none")
    assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"]) is (carry != "both")
    assert (state["exp_avg_sq"] >= 0).all()
    assert torch.equal(state["step"], before["step"])


def test_second_moments_are_exact_where_columns_are_scaled_and_permuted(tmp_path):
    _, callback = _stepped(tmp_path, carry="both")
    layer = callback.layers[0]
    with torch.no_grad():  # orthogonal columns, ascending: balancing only permutes, flips and scales them
        scale = torch.tensor([1e-2, 2e-2, 3e-2, 4e-2])
        layer.A.copy_(torch.linalg.qr(layer.A).Q * scale)
        layer.Bt.copy_(torch.linalg.qr(layer.Bt.T).Q.T)
    state = callback.optimizer.state[layer.A]
    old = state["exp_avg_sq"].clone()
    callback._call(callback.after)
    # the gradient of a column that grew by c^−½ shrinks by c^½
    torch.testing.assert_close(state["exp_avg_sq"], (old * scale).flip(-1), rtol=1e-4, atol=1e-12)


def test_an_optimizer_of_unknown_state_is_refused_by_name(tmp_path):
    adapted = training.adapt("balora", "llama", tmp_path / "base")
    with pytest.raises(ScaloraError, match=r"training.optim is 'adafactor'.*AdamW"):
        training.trainer(adapted, "llama", tmp_path / "out", optim="adafactor").train()
