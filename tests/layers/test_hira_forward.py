"""HiRA in one product against the definition and against PEFT's own layer, and when it steps aside."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import HiraConfig, PeftModel, get_peft_model
from peft.tuners.hira.layer import Linear

from helpers import models
from scalora.layers.hira_forward import HiraForward, fuse_hira, hadamard_linear


@given(
    r=st.integers(1, 4),
    shape=st.sampled_from([(3,), (2, 4), (1, 2, 3)]),
    inner=st.booleans(),
    biased=st.booleans(),
)
def test_it_is_the_definition(r, shape, inner, biased):
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=inner)
    W = torch.randn(7, 5, dtype=torch.float64)
    A, B = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((r, 5), (7, r)))
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if biased else None
    weights = torch.randn(*shape, 7, dtype=torch.float64)
    found = hadamard_linear(x, W, A, B, bias)
    wanted = torch.nn.functional.linear(x, W * (1 + B @ A), bias)
    torch.testing.assert_close(found, wanted)
    leaves = [t for t in (x, A, B, bias) if t is not None and t.requires_grad]
    gradients = (torch.autograd.grad((out * weights).sum(), leaves) for out in (found, wanted))
    for g, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(g, theirs)


def _pair(kind="llama", dtype=torch.float32, std=0.3, **options):
    """A model with a HiRA adapter that is not zero, as PEFT runs it and fused."""
    torch.manual_seed(2)
    model = get_peft_model(models.base(kind, dtype), HiraConfig(r=4, target_modules=models.TARGETS[kind], **options))
    for name, p in model.named_parameters():
        if "hira_" in name:
            torch.nn.init.normal_(p, std=std)
    fused = copy.deepcopy(model)
    fuse_hira(fused)
    return model, fused


def _run(model, kind, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**models.batch(kind))
    output.loss.backward()
    return output.logits.detach().float(), [p.grad.float() for p in models.trainable(model)]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_values_and_gradients_are_pefts(kind, precision):
    plain, fused = _pair(kind)
    assert sum(isinstance(m, HiraForward) for m in fused.modules()) == sum(type(m) is Linear for m in plain.modules())
    (logits, gradients), (mine, mine_gradients) = (_run(m, kind, precision == "autocast") for m in (plain, fused))
    tolerance = 2e-6 if precision == "float32" else 0.05
    torch.testing.assert_close(mine, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max()))
    for g, theirs in zip(mine_gradients, gradients, strict=True):
        assert (g - theirs).norm() <= 2 * tolerance * theirs.norm() + 1e-12


@pytest.mark.parametrize("std", [0.3, 0.03])
def test_under_autocast_it_is_as_near_to_the_truth_as_peft(std):
    plain, fused = _pair(std=std)
    truth = _run(copy.deepcopy(plain).double(), "llama")[0]
    errors = [(_run(model, "llama", autocast=True)[0] - truth).norm() for model in (plain, fused)]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize(
    "change",
    ["dropout", "conv1d", "two adapters", "listener", "trained weight", "wider adapter", "half precision"],
)
def test_out_of_the_ordinary_it_steps_aside(change, monkeypatch):
    kind = "gpt2" if change == "conv1d" else "llama"
    options = {"hira_dropout": 0.5} if change == "dropout" else {"fan_in_fan_out": True} if change == "conv1d" else {}
    model, fused = _pair(kind, **options)
    layers = [module for module in fused.modules() if isinstance(module, HiraForward)]
    if change == "two adapters":
        fused.add_adapter("other", model.peft_config["default"])
        fused.base_model.set_adapter(["default", "other"])
    for module in layers:
        if change == "listener":
            module.base_layer.register_forward_hook(lambda *_: None)
        if change == "trained weight":
            module.base_layer.weight.requires_grad_(True)
        if change == "half precision":
            module.base_layer.bfloat16()
        if change == "wider adapter":
            module.double()
            module.base_layer.float()
    calls = []
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x, *a, **k: calls.append(1) or forward(self, x, *a, **k))
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "half precision"):
        fused.train()(**models.batch(kind))
    assert len(calls) == len(layers) > 0


def test_it_is_disabled_merged_saved_and_loaded_like_pefts(tmp_path):
    plain, fused = _pair()
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(models.logits(plain, "llama"), models.logits(fused, "llama"))
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.base("llama"), tmp_path)
    torch.testing.assert_close(models.logits(loaded, "llama"), models.logits(fused, "llama"), rtol=1e-5, atol=1e-6)
    before = models.logits(fused, "llama")
    fused.merge_adapter()
    torch.testing.assert_close(models.logits(fused, "llama"), before, rtol=1e-5, atol=1e-6)
