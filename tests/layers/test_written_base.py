"""A base that accumulate='base' has written to: the adapter is not the update, and the weight is not the original."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import convert_to_lora
from peft.tuners.lora.intruders import reduce_intruder_dimension

from helpers import models
from helpers.attached import attached
from scalora import ScaloraError

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def written():
    model, optimizer, handle = attached(accumulate="base", lr=1e-2)
    models.train(model, optimizer, "llama", 3)
    handle.detach()
    return model


def _scaled(model, scale):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)


def _helper(model):
    with rescale_adapter_scale(model, 0.5):
        models.logits(model, "llama")


def _set_scale(model):
    try:
        _scaled(model, 0.0)
        models.logits(model, "llama")
    finally:
        _scaled(model, 1.0)


def _merge_scaled(model):
    try:
        _scaled(model, 0.5)
        model.merge_adapter()
    finally:
        _scaled(model, 1.0)


def _nobody_in_a_batch(model):
    ids = models.batch("llama")["input_ids"]
    with torch.no_grad():
        model.eval()(input_ids=ids, adapter_names=["__base__"] * len(ids))


def _add(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))


PARTS = {
    "set_scale": (_set_scale, r"scale 0\.0, but what accumulate='base' has moved .* stays at 2\.0"),
    "rescale_adapter_scale": (_helper, r"scale 1\.0, but what"),
    "merged at another scale": (_merge_scaled, r"scale 1\.0, but what"),
    "get_delta_weight": (lambda m: m.get_submodule(FIRST).get_delta_weight("default"), "a part of the update only"),
    "convert_to_lora": (lambda m: convert_to_lora(m, 2), "a part of the update only"),
    "svd": (
        lambda m: m.add_weighted_adapter(["default"], [1.0], "sum", combination_type="svd"),
        "accumulate='base' has added its moved differences to the base weights",
    ),
    "intruders": (lambda m: reduce_intruder_dimension(m, "default", "new"), "adapter 'new' cannot be added"),
    "add_adapter": (_add, "adapter 'other' cannot be added"),
    "__base__ in a batch": (_nobody_in_a_batch, "'__base__' in adapter_names would not give the untouched base"),
    "no adapter": (lambda m: m.base_model.set_adapter([]), r"set_adapter\(\[\]\) would not give"),
    "merged without adapters": (lambda m: m.merge_and_unload(adapter_names=[]), "merge_and_unload.* would not give"),
    "layers switched off": (lambda m: m.get_submodule(FIRST).enable_adapters(False), "switching the adapters off"),
}  # fmt: skip


@pytest.mark.parametrize("use", PARTS)
def test_whoever_asks_for_a_part_is_refused_by_the_name_of_a_layer(use, written):
    before = models.logits(written, "llama")
    with pytest.raises(ScaloraError, match=PARTS[use][1]) as refusal:
        PARTS[use][0](written)
    assert str(refusal.value).startswith("layer base_model.model.model.layers.")
    assert torch.equal(models.logits(written, "llama"), before)
    assert set(written.peft_config) == {"default"}


def test_merging_at_the_scale_of_training_is_right(written):
    model = copy.deepcopy(written)
    expected = models.logits(model, "llama")
    with rescale_adapter_scale(model, 1.0):
        torch.testing.assert_close(models.logits(model, "llama"), expected, rtol=0, atol=0)
    for safe in (True, False):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(models.logits(model, "llama"), expected, rtol=0, atol=1e-5)
        model.unmerge_adapter()
    torch.testing.assert_close(models.logits(model, "llama"), expected, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(models.logits(merged, "llama"), expected, rtol=0, atol=1e-5)


def test_the_scale_is_looked_at_in_a_compiled_model_too(written):
    compiled = torch.compile(copy.deepcopy(written), backend="eager")
    expected = models.logits(written, "llama")
    torch.testing.assert_close(models.logits(compiled, "llama"), expected, rtol=0, atol=1e-5)
    with pytest.raises(ScaloraError, match="stays at"):
        _helper(compiled)
