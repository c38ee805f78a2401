"""LoRA+, Riemannian preconditioning and LoRA-FA: the steps are those of their definitions, the head's are AdamW's."""

import peft.optimizers.lorafa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.optimizers import create_lorafa_optimizer
from transformers import Trainer

from helpers import models, training
from scalora import ScaloraError
from scalora.layers.peft_lora import find_layers
from scalora.methods.lora_fa import fixed_A_inverse
from scalora.runs.training import set_head_rate


def _made(name, folder, kind="bert", options=None, **arguments):
    adapted = training.adapt(name, kind, folder / "base", options=options or {})
    return adapted, training.trainer(adapted, kind, folder / "out", **{"learning_rate": 1e-2, **arguments})


def _settings(optimizer, model):
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


@pytest.mark.parametrize("head_rate", [None, 3e-4])
@pytest.mark.parametrize("name", ["lora+", "riemannian"])
def test_who_learns_how_fast(name, head_rate, tmp_path):
    adapted, made = _made(name, tmp_path, weight_decay=0.1)
    optimizer = made.create_optimizer()
    if head_rate:
        set_head_rate(optimizer, adapted.model, ["classifier"], head_rate)
    found = _settings(optimizer, adapted.model)
    assert set(found) == {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    for parameter, setting in found.items():
        if "lora_" not in parameter:
            assert setting == (head_rate or 1e-2, 0.0 if "bias" in parameter else 0.1)
        else:
            assert setting == (0.16 if name == "lora+" and "lora_B" in parameter else 1e-2, 0.1)


def test_the_schedule_keeps_the_ratio(tmp_path):
    _, made = _made("lora+", tmp_path, options={"ratio": 5}, lr_scheduler_type="linear")
    made.train()
    rates = [(group["initial_lr"], group["lr"]) for group in made.optimizer.param_groups]
    assert sorted(first for first, _ in rates) == pytest.approx([1e-2, 1e-2, 1e-2, 5e-2])
    assert all(last == 0 for _, last in rates)


def _gradients(model, kind):
    model.train()
    model(**models.batch(kind)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _random_B(model):
    for layer in find_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_riemannian_steps_are_the_preconditioned_ones(kind, tmp_path):
    adapted, made = _made("riemannian", tmp_path, kind, options={"reg": 0.03}, optim="sgd")
    _random_B(adapted.model)
    before = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if p.requires_grad}
    gradients = _gradients(adapted.model, kind)
    layers = {layer.name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in
              find_layers(adapted.model)}  # fmt: skip
    made.create_optimizer().step()
    after = dict(adapted.model.named_parameters())
    damping = 0.03 * torch.eye(4)
    for name, (A, B) in layers.items():
        expected = {
            "lora_A": torch.linalg.solve(B.T @ B + damping, gradients[f"{name}.lora_A.default.weight"]),
            "lora_B": torch.linalg.solve(A @ A.T + damping, gradients[f"{name}.lora_B.default.weight"].T).T,
        }
        for which, step in expected.items():
            key = f"{name}.{which}.default.weight"
            torch.testing.assert_close(after[key], before[key] - 1e-2 * step, rtol=1e-4, atol=1e-6)
    for name in before.keys() - {f"{n}.{w}.default.weight" for n in layers for w in ("lora_A", "lora_B")}:
        torch.testing.assert_close(after[name], before[name] - 1e-2 * gradients[name])


@given(m=st.integers(2, 9), n=st.integers(4, 9), r=st.integers(1, 4), s=st.floats(0.1, 8), seed=st.integers(0, 99))
def test_lora_fa_moves_the_weight_by_the_gradient_within_the_rows_of_A(m, n, r, s, seed):
    generator = torch.Generator().manual_seed(seed)
    A, G = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((r, n), (m, n)))
    g_B = s * G @ A.T
    moved = s * (g_B @ fixed_A_inverse(A, s)) @ A
    projector = torch.linalg.pinv(A) @ A
    torch.testing.assert_close(moved, G @ projector, rtol=0, atol=1e-6 * float(G.norm()))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_lora_fa_steps_as_pefts_without_bf16(kind, tmp_path, monkeypatch):
    adapted, made = _made("lora-fa", tmp_path, kind, optim="adamw_torch", adam_epsilon=1e-20)
    other = training.adapt("lora", kind, tmp_path / "base").model.double()
    adapted.model.double()  # else a step divides rounding by rounding where a gradient is next to nothing
    frozen = {n: p.clone() for n, p in adapted.model.named_parameters() if not p.requires_grad}
    assert any("lora_A" in n for n in frozen)
    made.train()
    ours = dict(adapted.model.named_parameters())
    assert all(torch.equal(ours[n], p) for n, p in frozen.items())
    assert set(made.optimizer.state) == {p for p in ours.values() if p.requires_grad}  # none for lora_A

    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    optimizer = create_lorafa_optimizer(other, r=4, lora_alpha=8, lr=1e-2)
    optimizer.param_groups[0]["eps"] = 1e-20  # theirs grows by the bias correction: 32 times at the first step
    theirs = Trainer(other, made.args, train_dataset=training.rows(kind), optimizers=(optimizer, None))
    theirs.train()
    for name, p in other.named_parameters():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lora+", "riemannian", "lora-fa"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_the_recipes_optimizer_is_kept(name, optim, tmp_path):
    _, made = _made(name, tmp_path, optim=optim, bf16=True)
    made.train()
    expected, _ = Trainer.get_optimizer_cls_and_kwargs(made.args)
    assert isinstance(made.optimizer.optimizer, expected)
    losses = training.losses(made)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["lora+", "riemannian"])
def test_an_optimizer_that_chooses_its_parameters_is_refused(name, tmp_path, monkeypatch):
    chosen = (torch.optim.AdamW, {"lr": 1e-2, "optimizer_dict": {}})  # as the layer-wise ones are given
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_: chosen))
    with pytest.raises(ScaloraError, match=r"training\.optim is 'sgd'.*adamw_torch"):
        _made(name, tmp_path, optim="sgd")
