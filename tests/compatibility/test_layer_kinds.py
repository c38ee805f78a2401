"""Kinds of layers: each is rescaled exactly, to the saved adapter, or refused by name, or left as PEFT's plain LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import scalora
from helpers import models
from helpers.attached import run
from helpers.kinds import KINDS, Images, Words, base, lora, outputs, trained, values
from scalora import ScaLoraConfig, ScaloraError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BASE_STORE_REFUSED = ["embedding-scaled", "conv2d-circular", "conv2d-channels-last"]
BASE_STORE = [kind for kind in KINDS if kind not in BASE_STORE_REFUSED]
NO_PRODUCT = {
    "embedding-max-norm": (lambda: Words(nn.Embedding(20, 8, max_norm=1.0)), "max_norm", KINDS["embedding"][1]),
    "embedding-scale-grad-by-freq": (
        lambda: Words(nn.Embedding(20, 8, scale_grad_by_freq=True)),
        "freq",
        KINDS["embedding"][1],
    ),
    "conv2d-groups": (lambda: Images(nn.Conv2d(4, 8, 3, groups=2)), "2 groups", values(4, 6, 6)),
}
MODELS = {
    "llama": ("llama", ["embed_tokens", "q_proj"]),
    "bert": ("bert", ["word_embeddings", "position_embeddings", "query"]),
    "gpt2": ("gpt2", ["wte", "wpe", "c_attn"]),
}


@pytest.mark.parametrize("case", KINDS)
def test_rescaled(case, tmp_path):
    model, _, handle, changes, losses = trained(case)
    assert len(changes) == 12
    assert max(changes) < 1e-5
    assert losses[-1] < losses[0]
    assert {layer.name.split(".")[-1] for layer in handle.layers} == {"first", "head"}
    assert all(factor.sub(1).abs().max() > 1e-3 for pair in handle.factors.values() for factor in pair)
    assert handle.layers[0].accumulated.P.any()
    untouched, expected = base(case), outputs(model, case)
    for layer, mine in zip(handle.layers, (untouched.first, untouched.head), strict=True):
        assert torch.equal(layer.base.weight, mine.weight)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), outputs(untouched, case))
    scalora.save_plain_lora(model, tmp_path / "plain")
    model.save_pretrained(tmp_path / "pretrained")
    model.save_pretrained(tmp_path / "state", state_dict=model.state_dict())
    for folder in ("plain", "pretrained", "state"):
        again = PeftModel.from_pretrained(base(case), tmp_path / folder)
        assert again.base_model.model.first.r["default"] > 2
        torch.testing.assert_close(outputs(again, case), expected, rtol=0, atol=1e-5)
    if "circular" not in case:  # there PEFT pads the adapter's input with zeros, which no merged weight does
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, case), expected, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(outputs(model.merge_and_unload(), case), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", BASE_STORE)
def test_rescaled_into_the_base(case):
    model, _, handle, changes, losses = trained(case, accumulate="base")
    assert max(changes) < 1e-5
    assert losses[-1] < losses[0]
    assert not torch.equal(handle.layers[0].base.weight, base(case).first.weight)
    expected = outputs(model, case)
    torch.testing.assert_close(outputs(model.merge_and_unload(), case), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", BASE_STORE_REFUSED)
def test_refused_by_the_base_store(case):
    model = lora(case)
    with pytest.raises(ScaloraError, match=r"accumulate='base'.*not an ordinary matrix"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)), ScaLoraConfig(accumulate="base"))


@pytest.mark.parametrize("case", MODELS)
def test_embeddings_of_models(case, tmp_path):
    kind, targets = MODELS[case]
    model = models.lora(kind, target_modules=targets)
    handle = run(model, kind=kind)
    assert sum("embed" in layer.name or ".w" in layer.name for layer in handle.layers) == len(targets) - 1
    scalora.save_plain_lora(model, tmp_path / "plain")
    again = PeftModel.from_pretrained(models.base(kind), tmp_path / "plain")
    torch.testing.assert_close(models.logits(again, kind), models.logits(model, kind), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", NO_PRODUCT)
def test_no_product(case, tmp_path):
    """Refused, or left as PEFT's plain LoRA."""
    made, words, inputs = NO_PRODUCT[case]
    torch.manual_seed(1)
    plain = made()
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["first", "head"]))
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    with pytest.raises(ScaloraError, match=rf"layer base_model\.model\.first .*{words}.*unsupported='leave'"):
        scalora.attach(model, optimizer)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=1, unsupported="leave"))
    assert [*handle.left] == ["base_model.model.first"]
    for step in range(6):
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    scalora.save_plain_lora(model, tmp_path / "plain")
    again = made()
    again.load_state_dict(start)
    again = PeftModel.from_pretrained(again, tmp_path / "plain")
    assert again.base_model.model.first.r["default"] == 2
    with torch.no_grad():
        torch.testing.assert_close(again(inputs(99)), model(inputs(99)), rtol=0, atol=1e-5)


def test_adapters_tied_between_embedding_and_head(tmp_path):
    """PEFT ties them by two parameters on one memory."""

    def made():
        plain = models.base("llama")
        plain.config.tie_word_embeddings = True
        plain.tie_weights()
        return plain

    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(made(), config)
    with pytest.raises(ScaloraError, match="shares its adapter with another layer"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)))
    handle = run(model, unsupported="leave")
    assert {name.split(".")[-1] for name in handle.left} == {"embed_tokens", "lm_head"}
    scalora.save_plain_lora(model, tmp_path / "plain")
    again = PeftModel.from_pretrained(made(), tmp_path / "plain")
    torch.testing.assert_close(models.logits(again, "llama"), models.logits(model, "llama"), rtol=0, atol=1e-5)
