"""A layer of E experts is E pairs of matrices to an event, and one plain LoRA to whoever saves it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import scalora
from helpers import models
from helpers.experts import base, lora, outputs, trained, wrappers
from scalora import ScaLoraConfig, ScaloraError
from scalora.algebra.scaling import calibrate, gram_products, optimal_scaling
from scalora.engine.plain_lora import Truncation, joined_factors
from scalora.layers.layout import as_columns, as_rows, each_expert, like_lora_a, like_lora_b

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_pefts_layout_of_experts(experts, r, m, n):
    """Against PEFT's own products of each expert."""

    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.bank = nn.Parameter(torch.zeros(experts, m, n))

    model = get_peft_model(Bank(), LoraConfig(r=r, target_parameters=["inner.bank"], init_lora_weights=False))
    (wrapper,) = wrappers(model)
    lora_A, lora_B = (part["default"].weight.detach() for part in (wrapper.lora_A, wrapper.lora_B))
    rows, columns = as_rows(lora_A, experts), as_columns(lora_B, experts)
    assert (rows.shape, columns.shape) == ((r, experts * n), (experts * m, r))
    assert torch.equal(like_lora_a(rows, lora_A, experts), lora_A)
    assert torch.equal(like_lora_b(columns, lora_B, experts), lora_B)
    P, Qt = each_expert(columns, rows, experts)
    expected = wrapper.get_delta_weight("default")
    torch.testing.assert_close(wrapper.scaling["default"] * P @ Qt, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_an_event_is_that_of_each_expert_alone(kind):
    model, optimizer, handle = trained(kind, 3)
    model(**models.batch("llama")).loss.backward()
    before = copy.deepcopy([[(p.detach(), p.grad, optimizer.state[p]) for p in (x.A, x.Bt)] for x in handle.layers])
    constants = handle.constants.clone()
    handle.rescale()
    start = 0
    for layer, pair in zip(handle.layers, before, strict=True):
        E, r = layer.experts, layer.rank
        own = slice(start, start := start + E)
        (A, grad_A, _), (Bt, grad_Bt, _) = pair
        matrices = each_expert(as_columns(A, E), as_rows(Bt, E), E)
        gradients = each_expert(as_columns(grad_A, E), as_rows(grad_Bt, E), E)
        alone = [
            optimal_scaling(a, b.mT, ga, gb.mT, c=c)
            for a, b, ga, gb, c in zip(
                *(x.view(E, *x.shape[-2:]) for x in (*matrices, *gradients)), constants[own], strict=True
            )
        ]
        alpha, beta = (torch.stack([getattr(each, name) for each in alone]) for name in ("alpha", "beta"))
        for found, expected in zip(handle.factors[layer.name], (alpha, beta), strict=True):
            torch.testing.assert_close(found.view(E, r), expected, rtol=1e-4, atol=1e-6)
        for p, (old, gradient, state), f, g, form in (
            (layer.A, pair[0], alpha, beta, lambda t, E=E: as_columns(t, E).view(E, -1, t.shape[1] // E)),
            (layer.Bt, pair[1], beta, alpha, lambda t, E=E: as_rows(t, E).view(-1, E, t.shape[1]).permute(1, 2, 0)),
        ):
            f, g = f.float()[:, None], g.float()[:, None]
            torch.testing.assert_close(form(p.detach()), form(old) * f, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(form(p.grad), form(gradient) * g, rtol=1e-4, atol=1e-9)
            now = optimizer.state[p]
            torch.testing.assert_close(form(now["exp_avg"]), form(state["exp_avg"]) * g, rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(form(now["exp_avg_sq"]), form(state["exp_avg_sq"]) * g**2, rtol=1e-4, atol=1e-12)


def test_an_expert_without_tokens_keeps_its_columns_and_is_calibrated_when_it_has_some():
    model = lora("mixtral")
    optimizer = torch.optim.SGD(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    layer, seen = handle.layers[-1], torch.zeros(4, dtype=torch.bool)
    for token in range(4):  # of which each reaches two of four experts
        model(input_ids=torch.tensor([[token]])).logits.square().mean().backward()
        used = as_columns(layer.A.grad, 4).view(4, -1).any(1)
        optimizer.step()
        optimizer.zero_grad()
        assert used.sum() == 2
        assert torch.equal((handle.factors[layer.name][0] != 1).any(1) & ~used, torch.zeros_like(used))
        seen |= used
        assert torch.equal(handle.constants[-4:].isfinite(), seen)


def test_a_truncation_is_each_experts_best_approximation(tmp_path):
    model, _, handle = trained("mixtral")
    layer = handle.layers[-1]
    P, Q = joined_factors(layer)
    truncation = Truncation(rank=3)
    scalora.save_plain_lora(model, tmp_path / "adapter", truncation)
    again = PeftModel.from_pretrained(base("mixtral"), tmp_path / "adapter")
    U, sigma, Vt = torch.linalg.svd(P @ Q.mT, full_matrices=False)
    expected = U[..., :3] * sigma[:, None, :3] @ Vt[:, :3]
    torch.testing.assert_close(wrappers(again)[-1].get_delta_weight("default"), expected, rtol=0, atol=1e-5)
    kept = sigma[:, :3].square().sum() / sigma.square().sum()
    assert truncation.kept[layer.name].energy == pytest.approx(float(kept), abs=1e-4)
    by_energy = Truncation(energy=0.9)
    scalora.save_plain_lora(model, tmp_path / "small", by_energy)
    rank = by_energy.kept[layer.name].rank
    shares = sigma.square().sum(0).cumsum(0) / sigma.square().sum()
    assert shares[rank - 1] >= 0.9 > (shares[rank - 2] if rank > 1 else 0)


def test_factors_of_a_wrong_shape_are_refused(tmp_path):
    model, _, handle = trained("mixtral", 3)
    flat = {layer.name: tuple(t.flatten(0, -2) for t in joined_factors(layer)) for layer in handle.layers}
    with pytest.raises(ScaloraError, match=r"give P \(4, 32, k\) and Q \(4, 24, k\)"):
        scalora.save_plain_lora(model, tmp_path / "adapter", lambda layer: flat[layer.name])


def test_lipschitz_gives_each_expert_its_constant():
    model, _, handle = trained("mixtral", 2, lipschitz=10.0)
    assert len(handle.constants) == 1 + 4 + 4
    assert handle.constants.unique().numel() == 1
    assert model.training


def test_plain_peft_goes_on_with_the_columns_of_a_folder(tmp_path):
    """With rank patterns, and rsLoRA: the scale stays that of the trained columns."""
    options = {"use_rslora": True, "rank_pattern": {"experts.down_proj": 3}}
    model, *_ = trained("qwen3-moe", lora_options=options)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base("qwen3-moe"), tmp_path / "adapter", is_trainable=True)
    assert len({module.r["default"] for module in wrappers(again)}) == 2
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=1e-5)
    optimizer = torch.optim.AdamW(models.trainable(again), lr=1e-3)
    scalora.attach(again, optimizer, ScaLoraConfig(interval=1))
    before = outputs(again)
    again(**models.batch("llama")).loss.backward()
    scalora.engine.event.attached_to(again).rescale()
    torch.testing.assert_close(outputs(again), before, rtol=0, atol=1e-5)


def test_bf16_experts_with_compensation():
    model = lora("mixtral").to(torch.bfloat16)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=1, accumulate="base"))
    models.train(model, optimizer, "llama", 4)
    layer = handle.layers[-1]
    lost = handle.store.lost[layer.name]
    assert lost.shape == layer.base_weight.shape == (4, 48, 32)
    assert lost.any()


def test_calibration_is_of_each_expert():
    _, _, handle = trained("mixtral", 1)
    assert handle.constants.isfinite().all()
    assert handle.constants.unique().numel() > 2
    layer = handle.layers[-1]
    assert calibrate(gram_products(*(torch.zeros(2, 3, 1),) * 4)).isnan().all()
    assert layer.rank == 2


def test_sharded_experts_are_refused_or_left(monkeypatch):
    """FSDP2's own tensors need processes; here whatever is asked for is one."""
    model = lora("mixtral")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    monkeypatch.setattr("scalora.layers.exactness.is_sharded", lambda tensor: True)
    with pytest.raises(ScaloraError, match=r"experts adapts a bare parameter that FSDP2 has sharded: use DDP"):
        scalora.attach(model, optimizer)
    assert len(scalora.attach(model, optimizer, ScaLoraConfig(unsupported="leave")).left) == 2
