"""The short forward pass against PEFT's own: values and gradients, and when it steps aside."""

import copy
import tempfile

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file

import scalora
from helpers import models
from scalora.layers.adopt import adopt
from scalora.layers.lora_forward import LoraForward, fuse_lora, shorten
from scalora.layers.peft_lora import find_layers


def _pair(kind="llama", dtype=torch.float32, **options):
    """A model with columns that are trained and columns that were accumulated, as PEFT loads it and as ours runs it."""
    fused = models.lora(kind, dtype, **options)
    optimizer = torch.optim.AdamW(models.trainable(fused), lr=1e-2)
    handle = scalora.attach(fused, optimizer, scalora.ScaLoraConfig(interval=1))
    models.train(fused, optimizer, kind, 3)
    handle.detach()
    with tempfile.TemporaryDirectory() as folder:
        fused.save_pretrained(folder)
        plain = PeftModel.from_pretrained(models.base(kind, dtype), folder, is_trainable=True)
    return plain, fused


def _run(model, kind, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**models.batch(kind))
    output.loss.backward()
    layers = find_layers(model)
    return output.logits.float(), [g[:, :4].float() for layer in layers for g in (layer.A.grad, layer.Bt.grad.mT)]


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_values_and_gradients_are_pefts(kind, precision):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    plain, fused = _pair(kind, dtype)
    assert sum(isinstance(m, LoraForward) for m in fused.modules()) == len(find_layers(fused))
    (logits, gradients), (mine, mine_gradients) = (_run(m, kind, precision == "autocast") for m in (plain, fused))
    tolerance = 2e-6 if precision == "float32" else 0.05  # of roundings to bf16, of which there are fewer here
    torch.testing.assert_close(mine, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max()))
    for g, theirs in zip(mine_gradients, gradients, strict=True):
        assert (g - theirs).norm() <= 2 * tolerance * theirs.norm() + 1e-12


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_plain_lora_is_trained_and_saved_the_same(kind, tmp_path):
    results = []
    for way in (False, True):
        model = models.lora(kind)
        if way:
            fuse_lora(model)
            assert any(isinstance(module, LoraForward) for module in model.modules())
        models.train(model, torch.optim.SGD(models.trainable(model), lr=0.1), kind, 4)
        model.save_pretrained(tmp_path / str(way))
        results.append(load_file(tmp_path / str(way) / "adapter_model.safetensors"))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_in_bf16_it_is_nearer_to_the_truth_than_peft():
    plain, fused = _pair("llama")
    truth = _run(copy.deepcopy(plain).double(), "llama")[0]
    errors = [(_run(model, "llama", autocast=True)[0] - truth).norm() for model in (plain, fused)]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_out_of_the_ordinary_it_steps_aside(options, monkeypatch):
    model = models.lora("gpt2" if "lora_bias" in options else "llama", **options)
    calls = []
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x, *a, **k: calls.append(1) or forward(self, x, *a, **k))
    layers = [module for module in model.modules() if type(module) is Linear]
    for module in layers:
        adopt(module, LoraForward)
    model.train()(**models.batch("llama"))
    assert len(calls) == len(layers)


def test_listeners_on_the_adapters_are_heard():
    model = models.lora("llama")
    layers = find_layers(model)
    for layer in layers:
        shorten(layer.module)
    heard = []
    layers[0].module.lora_A["default"].register_forward_hook(lambda *_: heard.append("forward"))
    layers[1].module.lora_A["default"].register_full_backward_pre_hook(lambda *_: heard.append("backward"))
    model(**models.batch("llama")).loss.backward()
    assert heard == ["forward", "backward"]


def test_disabled_and_merged_models_compute_what_peft_computes():
    plain, fused = _pair("llama")
    for change in ("disable", "merge"):
        outputs = []
        for model in (plain, fused):
            if change == "disable":
                with model.disable_adapter():
                    outputs.append(models.logits(model, "llama"))
            else:
                model.merge_adapter()
                outputs.append(models.logits(model, "llama"))
                model.unmerge_adapter()
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_a_single_vector_is_an_input_too():
    _, fused = _pair("llama")
    layer = next(m for m in fused.modules() if isinstance(m, LoraForward))
    x = torch.randn(2, layer.in_features)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
