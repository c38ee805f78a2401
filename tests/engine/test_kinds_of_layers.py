"""Embeddings and convolutions are rescaled as linear layers are, and go through all that those go through."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

import scalora
from helpers import models
from helpers.kinds import KINDS, base, lora, outputs, train, trained
from scalora import ScaLoraConfig
from scalora.engine.plain_lora import Truncation, joined_factors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STORES = ["adapter", "base"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_is_that_of_the_matrices(kind):
    """Rescaled columns, their gradients and AdamW's state, against the formulas."""
    model, optimizer, handle, *_ = trained(kind, 3)
    loss = nn.functional.cross_entropy(model(KINDS[kind][1](0)), torch.arange(12) % 5)
    loss.backward()
    layer = handle.layers[0]
    before = [copy.deepcopy((p.detach(), p.grad, optimizer.state[p])) for p in (layer.A, layer.Bt)]
    handle.rescale()
    alpha, beta = handle.factors[layer.name]
    for p, (old, gradient, state), own, other in zip(
        (layer.A, layer.Bt), before, (alpha, beta), (beta, alpha), strict=True
    ):
        own, other = ((f.float() if p is layer.A else f.float()[:, None]) for f in (own, other))
        wide = (lambda t: t.flatten(1)) if p.ndim > 2 else (lambda t: t)
        torch.testing.assert_close(wide(p.detach()), wide(old) * own)
        torch.testing.assert_close(wide(p.grad), wide(gradient) * other)
        torch.testing.assert_close(wide(optimizer.state[p]["exp_avg"]), wide(state["exp_avg"]) * other)
        torch.testing.assert_close(wide(optimizer.state[p]["exp_avg_sq"]), wide(state["exp_avg_sq"]) * other**2)


@pytest.mark.parametrize("kind", ["embedding", "embedding-scaled", "conv1d", "conv2d", "conv2d-channels-last"])
@pytest.mark.parametrize("config", [{"refresh": 4}, {"coordinates": "white"}, {"coordinates": "white", "refresh": 4}])
def test_refreshes_and_white_coordinates(tmp_path, kind, config):
    model, _, handle, changes, losses = trained(kind, 14, **config)
    assert max(changes) < 1e-5
    assert losses[-1] < losses[0]
    assert handle.refresh is None or len(handle.refresh.steps) == 3
    scalora.save_plain_lora(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(kind), tmp_path / "adapter")
    torch.testing.assert_close(outputs(again, kind), outputs(model, kind), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding-padding", "conv2d"])
def test_a_refresh_changes_no_function(kind):
    model = lora(kind)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=None, refresh=4))
    inner, changes = handle.refresh.refresh, []

    def refresh(*sketches):
        before = outputs(model, kind)
        inner(*sketches)
        changes.append((outputs(model, kind) - before).abs().max().item())

    handle.refresh.refresh = refresh
    train(model, optimizer, kind, 13)
    assert len(changes) == 3
    assert max(changes) < 1e-5


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
@pytest.mark.parametrize("store", STORES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(kind, store):
    model, optimizer, handle, *_ = trained(kind, 6, accumulate=store)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    train(model, optimizer, kind, 6, 6)
    resumed = lora(kind)
    scalora.prepare(resumed, handle.config)
    resumed.load_state_dict(saved[0])
    other = torch.optim.AdamW(models.trainable(resumed), lr=1e-2)
    other.load_state_dict(saved[1])
    scalora.attach(resumed, other, handle.config).load_state_dict(saved[2])
    train(resumed, other, kind, 6, 6)
    theirs = resumed.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_events_between_compiled_steps_cause_no_recompilation(kind):
    model = lora(kind)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=2))
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, optimizer, kind, 1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    train(compiled, optimizer, kind, 7, 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert len(handle.stats) == 4
    torch.testing.assert_close(outputs(compiled, kind), outputs(model, kind), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_a_bf16_base_rounds_the_whole_sum_once(kind):
    """The trained and the accumulated columns at once: what an event changes is at most a last place of the sum."""
    model = lora(kind)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    train(model, optimizer, kind, 6)
    first, x = model.base_model.model.first, KINDS[kind][1](99)
    first.base_layer.bfloat16()
    with torch.no_grad():
        x = x.bfloat16() if x.is_floating_point() else x
        found, base = first(x), first.base_layer(x)
        whole = first.base_layer.float()(x.float() if x.is_floating_point() else x)
        update = first(x.float() if x.is_floating_point() else x) - whole
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (base.float() + update).bfloat16(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_a_truncation_is_the_best_approximation(tmp_path, kind):
    model, _, handle, *_ = trained(kind)
    P, Q = joined_factors(handle.layers[0])
    scalora.save_plain_lora(model, tmp_path / "adapter", Truncation(rank=3))
    again = PeftModel.from_pretrained(base(kind), tmp_path / "adapter").base_model.model.first
    found = again.get_delta_weight("default")
    found = found.T if kind == "embedding" else found.flatten(1)
    U, sigma, Vt = torch.linalg.svd(P @ Q.mT)
    torch.testing.assert_close(found, U[:, :3] * sigma[:3] @ Vt[:3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_adapters_are_mixed_with_all_their_columns(kind):
    model, *_ = trained(kind)
    expected = outputs(model, kind)
    model.add_weighted_adapter(["default"], [1.0], "mean", combination_type="cat")
    model.set_adapter("mean")
    torch.testing.assert_close(outputs(model, kind), expected, rtol=0, atol=1e-5)
    model.eval()
    mixed = model(KINDS[kind][1](99), adapter_names=["default"] * 6 + ["__base__"] * 6)
    torch.testing.assert_close(mixed[:6], expected[:6], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[6:], outputs(base(kind), kind)[6:], rtol=0, atol=1e-6)
