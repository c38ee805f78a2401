"""RefLoRA: what reaches AdamW, and what becomes of its state."""

import pytest
import torch
from transformers import TrainerCallback

from helpers import models, training
from scalora import ScaloraError
from scalora.algebra.balancing import FactorGrams, refactoring
from scalora.layers.peft_lora import find_layers
from scalora.methods.reflora import RefLoraCallback, RefLoraOptions, RefLoraSCallback, RefLoraSOptions


class _Gradients(TrainerCallback):
    """Gradients of one layer as they are clipped, and as the optimizer gets them."""

    def __init__(self, model):
        self.model, self.clipped, self.stepped, self.factors, self.states = model, [], [], [], []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.optimizer.register_step_pre_hook(lambda *_: self.stepped.append(self._grads()))
        optimizer.optimizer.register_step_post_hook(lambda *_: self.states.append(self._moments(optimizer.optimizer)))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        layer = find_layers(self.model)[0]
        self.factors.append((layer.A.detach().clone(), layer.Bt.detach().T.clone()))
        self.clipped.append(self._grads())

    def _grads(self):
        layer = find_layers(self.model)[0]
        return layer.A.grad.clone(), layer.Bt.grad.T.clone()

    def _moments(self, optimizer):
        layer = find_layers(self.model)[0]
        return {key: optimizer.state[layer.A][key].clone() for key in ("exp_avg", "exp_avg_sq")}


def _watched(name, folder, steps=6, kind="llama", **options):
    adapted = training.adapt(name, kind, folder / "base", options=options)
    watch = _Gradients(adapted.model)
    made = training.trainer(adapted, kind, folder / "out", callbacks=[watch], max_steps=steps, learning_rate=5e-3)
    made.train()
    return adapted, watch


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_gradients_are_those_of_the_balanced_factors(kind, tmp_path):
    _, watch = _watched("reflora", tmp_path, kind=kind, warmup=2)
    for step, ((A, B), clipped, stepped) in enumerate(zip(watch.factors, watch.clipped, watch.stepped, strict=True)):
        S = refactoring(FactorGrams.of(A, B)) if step >= 2 else None
        maps = (S.S, S.inverse) if S else (torch.eye(4).double(),) * 2
        for before, after, map_ in zip(clipped, stepped, maps, strict=True):
            torch.testing.assert_close(after, (before.double() @ map_).float(), rtol=1e-5, atol=1e-8)


def test_without_a_warmup_the_start_still_learns(tmp_path):
    """At B = 0 the published S̃ = 0 would stop it for ever."""
    adapted, _ = _watched("reflora", tmp_path, warmup=0)
    for layer in find_layers(adapted.model):
        assert layer.A.any()
        assert layer.A.isfinite().all()
        assert layer.Bt.isfinite().all()


def test_moments_belong_to_the_next_steps_gradients(tmp_path):
    """Of a gradient that stays the same, the first moment is that of the gradient as it is turned now."""
    torch.manual_seed(0)
    adapted = training.adapt("reflora", "llama", tmp_path / "base")
    layer = find_layers(adapted.model)[0]
    G = torch.randn(layer.A.shape[0], layer.Bt.shape[1])
    torch.nn.init.normal_(layer.A)
    found = {}
    for carry in ("none", "first"):
        callback = RefLoraCallback(adapted.model, RefLoraOptions(warmup=1, carry=carry))
        optimizer = torch.optim.SGD([layer.A, layer.Bt], lr=1e-12, momentum=0.5)  # the matrices hardly move
        callback.layers, callback.optimizer, callback.warmup = [layer], optimizer, 1
        for callback.step in range(2):
            layer.A.grad, layer.Bt.grad = G @ layer.Bt.detach().T, (G.T @ layer.A.detach()).T
            callback._call(callback.before)
            optimizer.step()
            callback._call(callback.after)
        found[carry] = [optimizer.state[p]["momentum_buffer"].clone() for p in (layer.A, layer.Bt)]
    with torch.no_grad():
        S, inverse = refactoring(FactorGrams.of(layer.A, layer.Bt.T))
        turned = (G.double() @ layer.Bt.T.double() @ S, (G.T.double() @ layer.A.double() @ inverse).T)
    for buffer, expected in zip(found["first"], turned, strict=True):
        torch.testing.assert_close(buffer, 1.5 * expected.float(), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found["none"][0], 1.5 * turned[0].float(), rtol=1e-1)


def test_the_scalar_form_gives_both_one_norm(tmp_path):
    adapted, _ = _watched("reflora-s", tmp_path, warmup=2)
    for layer in find_layers(adapted.model):
        torch.testing.assert_close(layer.A.norm(), layer.Bt.norm(), rtol=1e-5, atol=0)


def test_the_scalar_form_carries_adams_state(tmp_path):
    adapted = training.adapt("reflora-s", "llama", tmp_path / "base")
    callback = RefLoraSCallback(adapted.model, RefLoraSOptions(warmup=0))
    callback.layers, callback.warmup = find_layers(adapted.model), 0
    parameters = [p for layer in callback.layers for p in (layer.A, layer.Bt)]
    optimizer = callback.optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    models.train(adapted.model, optimizer, "llama", 3)
    layer = callback.layers[0]
    before = [
        {"p": p.detach().clone(), **{k: v.clone() for k, v in optimizer.state[p].items()}} for p in (layer.A, layer.Bt)
    ]
    P = (layer.A.norm() / layer.Bt.norm()).sqrt().item()
    callback._call(callback.after)
    for p, old, factor in zip((layer.A, layer.Bt), before, (1 / P, P), strict=True):
        state = optimizer.state[p]
        torch.testing.assert_close(p.detach(), old["p"] * factor)
        torch.testing.assert_close(state["exp_avg"], old["exp_avg"] / factor)
        torch.testing.assert_close(state["exp_avg_sq"], old["exp_avg_sq"] / factor**2)
        assert torch.equal(state["step"], old["step"])


def test_the_warmup_is_a_tenth_of_the_run_and_at_most_the_published_one(tmp_path):
    adapted = training.adapt("reflora", "llama", tmp_path / "base")
    callback = adapted.callbacks[0]
    for steps, warmup in ((7, 0), (150, 15), (5000, 100)):
        callback.begin(None, steps)
        assert callback.warmup == warmup


@pytest.mark.parametrize("name", ["reflora", "reflora-s"])
def test_an_optimizer_of_unknown_state_is_refused(name, tmp_path):
    adapted = training.adapt(name, "llama", tmp_path / "base")
    with pytest.raises(ScaloraError, match=r"training.optim is 'adafactor'.*AdamW"):
        training.trainer(adapted, "llama", tmp_path / "out", optim="adafactor").train()
