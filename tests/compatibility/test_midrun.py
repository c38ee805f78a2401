"""What users do to a model between two steps: it goes on exactly, or the next step says what is wrong."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

import scalora
from helpers import models
from helpers.attached import attached, run
from scalora import ScaLoraConfig, ScaloraError
from scalora.engine.plain_lora import joined_factors

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def _lora(model, name="default"):
    return [module for module in model.modules() if name in getattr(module, "lora_A", ())]


def _add(model, optimizer):
    if "other" not in model.peft_config:
        model.add_adapter("other", LoraConfig(r=2, target_modules=models.TARGETS["llama"], init_lora_weights=False))


def _switch(model, optimizer):
    """There and back, with a forward pass: as TRL does where the reference is an adapter named "ref"."""
    _add(model, optimizer)
    model.set_adapter("other")
    models.logits(model, "llama")
    model.set_adapter("default")


def _delete_other(model, optimizer):
    _add(model, optimizer)
    model.delete_adapter("other")


def _disable(model, optimizer):
    with model.disable_adapter():
        models.logits(model, "llama")


def _rescale(model, optimizer):
    for layer in _lora(model):
        layer.scale_layer(2)
    models.logits(model, "llama")


def _freeze(model, optimizer, which="lora_"):
    for name, param in model.named_parameters():
        if name.startswith(f"{FIRST}.{which}") and "default" in name:
            param.requires_grad_(False)


def _add_group(model, optimizer):
    if len(optimizer.param_groups) == 1:
        norm = model.get_submodule("base_model.model.model.norm").weight.requires_grad_(True)
        optimizer.add_param_group({"params": [norm], "lr": 1e-3})


def _mode(model, optimizer):
    model.eval()
    models.logits(model, "llama")
    model.train()


WORKS = {
    "adapter-added": _add,
    "adapter-switched-and-back": _switch,
    "other-adapter-deleted": _delete_other,
    "adapters-disabled-for-a-pass": _disable,
    "layer-frozen": _freeze,
    "one-matrix-frozen": lambda model, optimizer: _freeze(model, optimizer, "lora_A"),
    "param-group-added": _add_group,
    "eval-and-train": _mode,
    "deepcopy": lambda model, optimizer: copy.deepcopy(model),
}


def _delete(name):
    return lambda model: model.delete_adapter(name)


def _leave(model):
    _add(model, None)
    model.set_adapter("other")


def _replace(model):
    for module in _lora(model):
        module.lora_A["default"].weight = nn.Parameter(module.lora_A["default"].weight.detach().clone())


REFUSED = {
    "trained-adapter-deleted": (_delete("default"), "'default' was deleted"),
    "trained-adapter-switched-off": (_leave, "'default' is not active: call model.set_adapter"),
    "adapters-disabled": (lambda model: model.base_model.disable_adapter_layers(), "adapters are disabled"),
    "adapter-merged": (lambda model: model.merge_adapter(), "unmerge_adapter"),
    "unloaded": (lambda model: model.unload(), "no longer part of the model"),
    "merged-and-unloaded": (lambda model: model.merge_and_unload(), "no longer part of the model"),
    "parameters-replaced": (_replace, "not in the optimizer"),
    "half": (lambda model: model.half(), "cast to torch.float16"),
    "to-bfloat16": (lambda model: model.to(torch.bfloat16), "cast to torch.bfloat16"),
}
BASE_REFUSED = {
    "base-store-disable": (_disable, "disable_adapter.. would not give the untouched base"),
    "base-store-other-adapter": (_add, "adapter 'other' cannot be added: its base weights hold"),
    "base-store-scale": (_rescale, "has scale 4.0, but what accumulate='base' has moved"),
    "base-store-delta": (
        lambda model, optimizer: model.get_submodule(FIRST).get_delta_weight("default"),
        "a part of the update only",
    ),
}


@pytest.mark.parametrize("case", WORKS)
def test_goes_on(case):
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
    still = {}

    def between(step, handle):
        if step in (2, 4):
            WORKS[case](model, optimizer)
            own = {n: p for n, p in model.named_parameters() if "lora_" in n and ".default." in n}
            still.update({n: p.clone() for n, p in own.items() if not p.requires_grad})

    run(model, optimizer, between=between)
    assert bool(still) == ("frozen" in case)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in still.items())
    gathered = [name for name, p in model.named_parameters() if ".accumulated." in name and p.grad is not None]
    assert gathered == []  # it would count in clip_grad_norm_


@pytest.mark.parametrize("case", REFUSED)
def test_the_next_step_refuses(case):
    model, optimizer, _ = attached()
    models.train(model, optimizer, "llama", 3)
    model(**models.batch("llama")).loss.backward()
    REFUSED[case][0](model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ScaloraError, match=REFUSED[case][1]):
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # nothing was done by halves


@pytest.mark.parametrize("case", BASE_REFUSED)
def test_what_a_written_base_cannot_serve_is_refused(case):
    model, optimizer, _ = attached(accumulate="base")
    models.train(model, optimizer, "llama", 2)
    model(**models.batch("llama")).loss.backward()

    def both():
        BASE_REFUSED[case][0](model, optimizer)
        optimizer.step()

    with pytest.raises(ScaloraError, match=BASE_REFUSED[case][1]):
        both()


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_before_the_first_step(dtype, accumulate):
    """After attach, before there is any state. Half precision needs a larger eps and rounds what the base takes."""
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3, eps=1e-4)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=1, accumulate=accumulate))
    model.to(dtype)
    first, last = models.train(model, optimizer, "llama", 1), models.train(model, optimizer, "llama", 8)
    assert last < first or dtype is torch.float16
    assert max(event.moved for event in handle.stats) > 1e-3
    if accumulate == "base":
        assert bool(handle.store.lost) == (dtype is not torch.float64)  # what rounding takes is kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_moved_keeps_32_bits_where_the_model_is_cast(dtype):
    """The adapter's columns lose exactly what is written there, whichever of cast and attach came first."""
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3, eps=1e-4)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    model.to(dtype)
    assert {layer.accumulated.P.dtype for layer in handle.layers} == {torch.float32}
    changes, inner = [], handle.rescale

    def updates():
        pairs = [joined_factors(layer) for layer in handle.layers]
        return [P.double() @ Q.double().mT for P, Q in pairs]

    def event():
        before = updates()
        inner()
        changes.extend(float((b - a).norm() / b.norm()) for a, b in zip(before, updates(), strict=True) if b.any())

    handle.rescale = event
    models.train(model, optimizer, "llama", 8)
    assert len(changes) > len(handle.layers)
    assert max(changes) < 1e-5


def test_merged_and_unmerged_between_steps():
    model = models.lora("llama")

    def between(step, handle):
        before = models.logits(model, "llama")
        model.merge_adapter()
        merged = models.logits(model, "llama")
        model.unmerge_adapter()
        for other in (merged, models.logits(model, "llama")):  # PEFT's own rounding reaches the base weights
            torch.testing.assert_close(other, before, rtol=0, atol=1e-5)

    run(model, between=between, steps=5, untouched=False)


def test_learning_rates_differ():
    """LoRA+: another rate for each of the two matrices. With a given L there would be no one c."""
    model = models.lora("llama")
    a, b = ([p for n, p in model.named_parameters() if key in n] for key in ("lora_A", "lora_B"))
    run(model, torch.optim.AdamW([{"params": a, "lr": 1e-3}, {"params": b, "lr": 8e-3}]))
    model = models.lora("llama")
    a, b = ([p for n, p in model.named_parameters() if key in n] for key in ("lora_A", "lora_B"))
    optimizer = torch.optim.AdamW([{"params": a, "lr": 1e-3}, {"params": b, "lr": 8e-3}])
    with pytest.raises(ScaloraError, match=r"lipschitz=10\.0 needs one positive learning rate"):
        scalora.attach(model, optimizer, ScaLoraConfig(lipschitz=10.0))


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_zero_grad_in_place(accumulate):
    """Gradients that are zeroed rather than dropped give the same run."""
    results = []
    for to_none in (True, False):
        model, optimizer, _ = attached(accumulate=accumulate)
        for step in range(4):
            model(**models.batch("llama", step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        results.append(models.logits(model, "llama"))
    assert torch.equal(*results)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("scaling", ["paper", "nonnegative", "scalar", "normalize"])
def test_a_layer_without_gradient_stays_and_joins_later(scaling, to_none):
    """A mixture's expert that no token reaches, from the first step on or in between."""
    model, optimizer, handle = attached(scaling=scaling, optimizer_cls=torch.optim.SGD, lr=0.1)
    index = next(i for i, layer in enumerate(handle.layers) if layer.name == FIRST)
    layer = handle.layers[index]
    for step in range(8):
        model(**models.batch("llama")).loss.backward()
        idle = step in (0, 1, 5)
        if idle:
            for p in (layer.A, layer.Bt):
                p.grad = None if to_none else p.grad.zero_()
        before = layer.A.detach().clone(), layer.Bt.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        if idle:
            assert torch.equal(layer.A, before[0])
            assert torch.equal(layer.Bt, before[1])
            assert bool(handle.constants[index].isnan()) == (step < 2)  # not calibrated on nothing
    assert bool(layer.accumulated.P.any())


def test_a_weight_decay_that_comes_in_mid_run_is_refused():
    model, optimizer, _ = attached(optimizer_cls=torch.optim.SGD, opt={"momentum": 0.9})
    models.train(model, optimizer, "llama", 2)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ScaloraError, match=r"weight_decay=0\.1"):
        models.train(model, optimizer, "llama", 1)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_second_adapter_accumulates_for_itself():
    """Training another adapter of the same model leaves the first one's function as it is."""
    model, optimizer, handle = attached()
    models.train(model, optimizer, "llama", 3)
    handle.detach()
    first = models.logits(model, "llama")
    _add(model, optimizer)
    model.set_adapter("other")
    second = torch.optim.AdamW(models.trainable(model))
    before = models.logits(model, "llama")
    scalora.attach(model, second, ScaLoraConfig(interval=1))
    assert torch.equal(models.logits(model, "llama"), before)
    models.train(model, second, "llama", 3)
    model.set_adapter("default")
    assert torch.equal(models.logits(model, "llama"), first)
    model.delete_adapter("other")
    assert torch.equal(models.logits(model, "llama"), first)
