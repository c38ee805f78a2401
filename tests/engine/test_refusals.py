"""Ground on which nothing exact can be done is refused, with a message that names it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scalora
from helpers import models
from helpers.attached import attached
from scalora import ScaLoraConfig, ScaloraError


def test_state_of_another_configuration_is_refused():
    _, _, handle = attached()
    _, _, other = attached(scaling="scalar")
    with pytest.raises(ScaloraError, match=r"scaling is 'scalar'.*'paper'"):
        other.load_state_dict(handle.state_dict())


def test_state_of_another_rank_or_base_model_is_refused():
    model, _, handle = attached()
    _, _, smaller = attached(lora={"r": 2})
    with pytest.raises(ScaloraError, match=r"layer .* has rank 2, but had 4"):
        smaller.load_state_dict(handle.state_dict())
    state = handle.state_dict()
    with torch.no_grad():
        model.get_base_model().model.norm.weight.add_(1)
    with pytest.raises(ScaloraError, match="base model is another"):
        handle.load_state_dict(state)


@pytest.mark.parametrize("other", [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 5}}])
def test_state_of_another_scale_is_refused(other):
    _, _, handle = attached()
    _, _, scaled = attached(lora=other)
    with pytest.raises(ScaloraError, match=r"layer .* has scale .* \(lora_alpha, use_rslora\), but had 2\.0"):
        scaled.load_state_dict(handle.state_dict())
    assert scaled.step == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "DoRA|Dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_alpha": 0}, "has scale 0"),
    ],
)
def test_layers_that_are_not_plain_lora_are_refused_by_name(options, words):
    model = models.lora("llama", **options)
    with pytest.raises(ScaloraError, match=f"layer .*({words})"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)))


def test_other_bad_ground_is_refused():
    plain = models.base("llama")
    with pytest.raises(ScaloraError, match="no trainable LoRA layer"):
        scalora.attach(plain, torch.optim.AdamW(plain.parameters()))

    model, optimizer, _ = attached()
    with pytest.raises(ScaloraError, match="already has a ScaLora"):
        scalora.attach(model, optimizer)

    model = models.lora("llama")
    with pytest.raises(ScaloraError, match="not in the optimizer"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)[:2]))
    with pytest.raises(ScaloraError, match="int"):
        scalora.attach(model, 3)  # pyright: ignore

    model.merge_adapter()
    with pytest.raises(ScaloraError, match="merged"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)))

    model = models.lora("gpt2", target_modules=["c_attn", "lm_head"])  # the head shares its weight with the embedding
    optimizer = torch.optim.AdamW(models.trainable(model))
    with pytest.raises(ScaloraError, match="lm_head"):
        scalora.attach(model, optimizer, ScaLoraConfig(accumulate="base"))

    conv = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    model = get_peft_model(conv, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ScaloraError, match="2 groups"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)))


def test_a_closure_is_refused():
    _, optimizer, _ = attached()
    with pytest.raises(ScaloraError, match="closure"):
        optimizer.step(lambda: torch.tensor(0.0))


def test_a_quantised_base_is_refused_by_the_base_store_only():
    model = models.lora("llama")
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.shape == (32, 32) and not module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    optimizer = torch.optim.AdamW(models.trainable(model))
    with pytest.raises(ScaloraError, match=r"accumulate='base'.*quantised"):
        scalora.attach(model, optimizer, ScaLoraConfig(accumulate="base"))
    scalora.attach(model, optimizer)


def by_autograd_grad(loss, params):
    for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
        p.grad = g


def by_inputs(loss, params):
    loss.backward(inputs=params)


@pytest.mark.parametrize("way", [by_autograd_grad, by_inputs])
@pytest.mark.parametrize(
    ("config", "setting"), [({"refresh": 4}, "refresh"), ({"coordinates": "white"}, "coordinates='white'")]
)
def test_gradients_that_sketches_cannot_see_are_refused(way, config, setting):
    model = models.lora("llama", r=2)
    params = models.trainable(model)
    optimizer = torch.optim.AdamW(params)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=None, **config))
    before = []

    def train():
        for step in range(2):  # a refresh begins to look after the first
            way(model(**models.batch("llama", step)).loss, params)
            before[:] = [p.detach().clone() for p in params]
            optimizer.step()

    with pytest.raises(ScaloraError, match=rf"^{setting} needs sketches .* call loss\.backward\(\)"):
        train()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
