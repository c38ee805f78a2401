"""An event changes the adapters, never the function: in every dtype, store and architecture, hundreds of times."""

import math

import pytest
import torch
from peft import LoraConfig

import scalora
from helpers import models
from helpers.attached import accumulated, attached, full, watch
from scalora import ScaLoraConfig
from scalora.engine.stores.adapter import SLOTS

KINDS, STORES = ("llama", "bert", "gpt2"), ("adapter", "base")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", STORES)
@pytest.mark.parametrize("scaling", ["paper", "nonnegative", "scalar", "normalize"])
def test_an_event_leaves_the_function_unchanged(kind, accumulate, scaling):
    model, optimizer, handle = attached(kind, accumulate=accumulate, scaling=scaling)
    changes = watch(handle, model, kind)
    models.train(model, optimizer, kind, 10)
    assert len(changes) == 10
    assert max(change for change, recompressed in changes if not recompressed) < 1e-5
    assert max(event.moved for event in handle.stats) > 1e-3  # something did move


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_an_event_changes_logits_by_no_more_than_one_rounding(kind):
    model, optimizer, handle = attached(kind, torch.bfloat16)
    changes = watch(handle, model, kind)
    models.train(model, optimizer, kind, 12)
    largest = models.logits(model, kind).abs().max().item()
    one_rounding = 2.0 ** (math.floor(math.log2(largest)) - 7)  # the step between bf16 numbers of that size
    assert max(change for change, recompressed in changes if not recompressed) <= one_rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_half_precision_base_is_off_by_at_most_one_rounding_per_weight(kind, dtype):
    """However many events: what rounding takes is given back, so W + lost + s·ABᵀ moves only with the optimizer."""
    model, optimizer, handle = attached(kind, dtype, accumulate="base", opt={"eps": 1e-4})  # 1e-8 is zero in fp16
    inner, errors = handle.rescale, []

    def whole(layer):
        lost = handle.store.lost[layer.name].double()
        return layer.base_weight.double() + lost + layer.scale * layer.A.double() @ layer.Bt.double()

    def event():
        before = [whole(layer) for layer in handle.layers]
        inner()
        errors.append(
            max((whole(layer) - W).abs().max().item() for layer, W in zip(handle.layers, before, strict=True))
        )

    handle.rescale = event
    models.train(model, optimizer, kind, 12)
    ulp = torch.finfo(dtype).eps
    for layer in handle.layers:
        weight = layer.base_weight.float().abs().clamp(min=1e-4)
        assert (handle.store.lost[layer.name].float().abs() <= weight * ulp).all()
    assert max(errors) < 0.1 * ulp * 0.02  # the weights are of size 0.02: far below their own rounding


def test_half_precision_adapters_are_rescaled_without_any_rounding():
    model, optimizer, handle = attached("llama", torch.float32)
    handle.detach()
    for layer in handle.layers:
        layer.A.data, layer.Bt.data = layer.A.data.bfloat16(), layer.Bt.data.bfloat16()
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    inner, exact = handle.rescale, []

    def event():
        before = [(layer.A.double() @ layer.Bt.double()) * layer.scale + accumulated(layer) for layer in handle.layers]
        recompressed = full(handle.store)
        inner()
        after = [(layer.A.double() @ layer.Bt.double()) * layer.scale + accumulated(layer) for layer in handle.layers]
        if not recompressed:
            exact.append(all(torch.allclose(x, y, rtol=0, atol=1e-7) for x, y in zip(before, after, strict=True)))

    handle.rescale = event
    models.train(model, optimizer, "llama", 8)
    assert all(exact)
    assert handle.stats[-1].moved > 0


@pytest.mark.parametrize("accumulate", STORES)
def test_two_hundred_events_do_not_drift(accumulate):
    """The function after 200 events is what the optimizer's steps alone added up to."""
    kind = "llama"
    model, optimizer, handle = attached(
        kind, accumulate=accumulate, lr=1e-3, **({"capacity": 32} if accumulate == "adapter" else {})
    )
    changes = watch(handle, model, kind)
    models.train(model, optimizer, kind, 200)
    total = sum(change for change, _ in changes)
    assert total < 1e-3, total  # capacity 32 = full rank here: nothing is discarded, only rounded
    assert max(change for change, _ in changes) < 1e-5


def test_a_recompression_changes_the_weights_by_what_it_reports():
    model, optimizer, handle = attached(capacity=4)
    models.train(model, optimizer, "llama", SLOTS + 1)  # capacity 4 = r: one slot more at the beginning
    before = [accumulated(layer) for layer in handle.layers]
    assert full(handle.store)
    handle.store.recompress()
    for layer, whole, discarded in zip(handle.layers, before, handle.store.discarded, strict=True):
        lost = (whole - accumulated(layer)).square().sum() / layer.scale**2
        torch.testing.assert_close(lost.float(), discarded, rtol=1e-3, atol=1e-9)
        assert torch.linalg.matrix_rank(accumulated(layer), rtol=1e-5) <= 4
    assert handle.store.discarded.sum() > 0
    models.train(model, optimizer, "llama", 1, start=SLOTS + 1)
    assert handle.stats[-1].discarded == pytest.approx(float(handle.store.discarded_share(torch.zeros(()))))
    assert 0 < handle.stats[-1].discarded < 1


def test_the_base_is_bitwise_untouched_and_disable_adapter_gives_it_back():
    untouched = models.base("llama")
    model, optimizer, handle = attached(accumulate="adapter")
    models.train(model, optimizer, "llama", 12)
    with model.disable_adapter():
        assert torch.equal(models.logits(model, "llama"), models.logits(untouched, "llama"))
    for layer in handle.layers:
        name = layer.name.split("base_model.model.", 1)[-1]
        assert torch.equal(layer.base_weight, untouched.get_submodule(name).weight)


@pytest.mark.parametrize("accumulate", STORES)
def test_adapters_that_became_nan_do_not_reach_the_store(accumulate):
    model, optimizer, handle = attached(accumulate=accumulate)
    models.train(model, optimizer, "llama", 2)
    models.trainable(model)[0].data.fill_(float("nan"))
    base = handle.layers[0].base_weight.clone()
    model(**models.batch("llama")).loss.backward()
    handle.rescale()
    assert torch.equal(handle.layers[0].base_weight, base)
    if accumulate == "adapter":
        assert torch.isfinite(accumulated(handle.layers[0])).all()


@pytest.mark.parametrize("accumulate", STORES)
def test_a_frozen_adapter_of_the_users_stays_active_and_untouched(accumulate):
    model = models.lora("llama")
    model.add_adapter("style", LoraConfig(r=2, target_modules=models.TARGETS["llama"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "style"])
    style = {name: p for name, p in model.named_parameters() if ".style." in name}
    for p in style.values():
        p.requires_grad_(False)
    before = {name: p.clone() for name, p in style.items()}
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
    start = models.logits(model, "llama")
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=1, accumulate=accumulate))
    torch.testing.assert_close(models.logits(model, "llama"), start, rtol=1e-5, atol=1e-6)  # attaching changes nothing
    changes = watch(handle, model, "llama")
    models.train(model, optimizer, "llama", 4)
    assert max(change for change, _ in changes) < 1e-5
    assert "style" in model.active_adapters
    assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in style.items())
