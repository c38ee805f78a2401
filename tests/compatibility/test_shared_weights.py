"""Several layers on one weight: each has columns of its own, and whatever would change the weight is refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import scalora
from helpers import models
from helpers.attached import run
from scalora import ScaLoraConfig, ScaloraError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
REPLICATED = {"layer_replication": [[0, 2], [0, 2]], "target_modules": ["q_proj", "up_proj"]}
SHARED = {
    "replicated": ("base", REPLICATED),
    "embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "both": ("tied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
}


def base(case):
    model = models.base("llama")
    if SHARED[case][0] == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def lora(case):
    made = base(case)
    torch.manual_seed(2)
    return get_peft_model(made, LoraConfig(r=4, lora_alpha=8, **SHARED[case][1]))


def shared(handle):
    """The layers whose weight another layer, or a module without an adapter, has too."""
    names = ("embed_tokens", "lm_head", "layers.2.", "layers.3.")
    return [layer for layer in handle.layers if any(name in layer.name for name in names)]


@pytest.mark.parametrize("case", SHARED)
def test_each_has_its_own_columns(case, tmp_path):
    model = lora(case)
    handle = run(model)
    assert len(shared(handle)) == {"replicated": 4, "both": 2}.get(case, 1)
    assert len({layer.accumulated.P.data_ptr() for layer in handle.layers}) == len(handle.layers)
    expected = models.logits(model, "llama")
    scalora.save_plain_lora(model, tmp_path / "plain")
    model.save_pretrained(tmp_path / "pretrained")
    for folder in ("plain", "pretrained"):
        again = PeftModel.from_pretrained(base(case), tmp_path / folder)
        torch.testing.assert_close(models.logits(again, "llama"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", SHARED)
def test_the_base_store_is_refused(case):
    model = lora(case)
    with pytest.raises(ScaloraError, match=r"would change what shares the weight of layer .*accumulate='adapter'"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)), ScaLoraConfig(accumulate="base"))


@pytest.mark.parametrize("case", SHARED)
def test_merging_is_refused_until_each_has_a_weight_of_its_own(case):
    model = lora(case)
    handle = run(model)
    expected = models.logits(model, "llama")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ScaloraError, match="its weight serves elsewhere in the model too"):
            merge()
    torch.testing.assert_close(models.logits(model, "llama"), expected, rtol=0, atol=0)
    for layer in shared(handle):
        layer.base.weight = nn.Parameter(layer.base.weight.clone())
    torch.testing.assert_close(models.logits(model.merge_and_unload(), "llama"), expected, rtol=0, atol=1e-5)
