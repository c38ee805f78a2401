"""unsupported="leave": what cannot be rescaled trains as PEFT's plain LoRA beside what can."""

import warnings

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import scalora
from helpers import models
from helpers.attached import run
from helpers.zoo import KINDS, adamw
from scalora import ScaLoraCallback, ScaLoraConfig, ScaloraError
from scalora.engine.plain_lora import Truncation
from scalora.layers.stand_in import StandIn

LEAVE = {"unsupported": "leave"}
STORES = ["adapter", "base"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def mixed(target_modules=("q_proj", "v_proj"), **options):
    """Two layers train only one of their two matrices."""
    model = models.lora("llama", target_modules=[*target_modules, "up_proj"], **options)
    for layer in left_layers(model).values():
        layer.lora_B.requires_grad_(False)
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return model


def left_layers(model):
    return {name: module for name, module in model.named_modules() if name.endswith("up_proj")}


@pytest.mark.parametrize("store", STORES)
def test_events_leave_them_alone(store):
    model, changed = mixed(), []

    def watched(step, handle):
        inner = handle.rescale

        def event():
            before = {name: p.clone() for name, p in model.named_parameters() if "up_proj" in name}
            inner()
            changed.extend(name for name, p in model.named_parameters() if name in before and not before[name].equal(p))

        handle.rescale = event

    handle = run(model, between=watched, accumulate=store, **LEAVE)
    assert not changed
    assert {layer.name.split(".")[-1] for layer in handle.layers} == {"q_proj", "v_proj"}
    assert {name.split(".")[-1] for name in handle.left} == {"up_proj"}
    assert all("only one of its two" in why for why in handle.left.values())
    assert not any(isinstance(module, StandIn) for module in left_layers(model).values())
    assert all(p.grad is None or p.abs().sum() > 0 for p in models.trainable(model))  # they do train


@pytest.mark.parametrize("config", [{"coordinates": "white"}, {"refresh": 4, "interval": None}, {"lipschitz": 10.0}])
def test_they_train_with_every_other_part(config):
    model = mixed()
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(**{"interval": 1, **config}, **LEAVE))
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    models.train(model, optimizer, "llama", 9)
    assert all(not before[name].equal(p) for name, p in model.named_parameters() if name in before)
    assert handle.left


def test_they_step_as_plain_lora_does():
    """With nothing moved in the others, a run of one step is plain PEFT's, bit for bit."""
    ours, plain = mixed(), mixed()
    for model in (ours, plain):
        optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
        if model is ours:
            scalora.attach(model, optimizer, ScaLoraConfig(interval=5, **LEAVE))
        models.train(model, optimizer, "llama", 1)
    theirs = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        if "up_proj" in name and ".lora_" in name:
            torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("how", ["save_plain_lora", "save_pretrained", "checkpoint"])
def test_plain_peft_loads_what_is_saved(tmp_path, how, rslora):
    model = mixed(use_rslora=rslora, rank_pattern={"v_proj": 3, "layers.1.mlp.up_proj": 2})
    run(model, **LEAVE)
    if how == "save_plain_lora":
        scalora.save_plain_lora(model, tmp_path / "adapter")
    else:
        state = {"state_dict": model.state_dict()} if how == "checkpoint" else {}
        model.save_pretrained(tmp_path / "adapter", **state)
    again = PeftModel.from_pretrained(models.base("llama"), tmp_path / "adapter")
    ranks = {name: module.r["default"] for name, module in left_layers(again).items()}
    assert sorted(ranks.values()) == [2, 4]
    assert ranks == {name: module.r["default"] for name, module in left_layers(model).items()}
    torch.testing.assert_close(models.logits(again, "llama"), models.logits(model, "llama"), rtol=0, atol=1e-5)


def test_a_truncation_leaves_them_whole(tmp_path):
    model = mixed()
    run(model, **LEAVE)
    scalora.save_plain_lora(model, tmp_path / "adapter", Truncation(rank=2))
    again = PeftModel.from_pretrained(models.base("llama"), tmp_path / "adapter")
    assert {m.r["default"] for m in left_layers(again).values()} == {4}
    weights = dict(again.named_parameters())
    for name, p in model.named_parameters():
        if "up_proj" in name and ".lora_" in name:
            assert torch.equal(weights[name], p)


def test_merging_holds_both():
    model = mixed()
    run(model, **LEAVE)
    expected = models.logits(model, "llama")
    torch.testing.assert_close(models.logits(model.merge_and_unload(), "llama"), expected, rtol=0, atol=1e-5)


def test_a_model_with_nothing_to_rescale_is_refused():
    for options, words in (({"use_dora": True}, "DoraLinearVariant"), ({"lora_bias": True}, "lora_bias")):
        model = models.lora("llama", **options)
        with pytest.raises(ScaloraError, match=rf"layer .*{words}.*unsupported='leave' has nothing to rescale"):
            scalora.attach(model, torch.optim.AdamW(models.trainable(model)), ScaLoraConfig(**LEAVE))


def test_a_refusal_names_the_way_out():
    model = mixed()
    with pytest.raises(ScaloraError, match=r"only one of its two.*unsupported='leave'"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)))
    with pytest.raises(ScaloraError, match=r"^unsupported is 'drop': choose one of refuse, leave"):
        ScaLoraConfig(unsupported="drop")  # pyright: ignore


def test_one_layer_of_another_kind_is_named_once():
    model = models.lora("llama")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    dora = models.lora("llama", use_dora=True).peft_config["default"]
    layer.update_layer("default", r=4, lora_alpha=8, config=dora)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=1, **LEAVE))
        models.train(model, optimizer, "llama", 3)
    (said,) = [str(each.message) for each in seen if "plain LoRA" in str(each.message)]
    assert said.startswith(f"layer {next(iter(handle.left))} trains as PEFT's plain LoRA, since it uses a LoRA variant")
    assert len(handle.left) == 1
    assert len(handle.layers) == 7


def trained(folder, steps, resume=None, **options):
    model = mixed(**options)
    ids = torch.randint(0, models.VOCABULARY, (8, 10), generator=torch.Generator().manual_seed(3))
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=3, logging_steps=1, report_to="none", use_cpu=True, seed=5,
        learning_rate=3e-3, lr_scheduler_type="constant", per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    callback = ScaLoraCallback(ScaLoraConfig(interval=2, **LEAVE))
    made = Trainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in ids], callbacks=[callback])
    made.train(resume_from_checkpoint=resume)
    return model, made


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "embed_tokens"]])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(tmp_path, targets):
    whole, made = trained(tmp_path / "whole", 6, target_modules=targets)
    assert made.state.log_history[-2]["scalora/left"] == 2
    trained(tmp_path / "part", 3, target_modules=targets)
    resumed, _ = trained(tmp_path / "part", 6, tmp_path / "part" / "checkpoint-3", target_modules=targets)
    theirs = resumed.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in whole.state_dict().items())
    again = PeftModel.from_pretrained(models.base("llama"), tmp_path / "whole" / "checkpoint-6")
    torch.testing.assert_close(models.logits(again, "llama"), models.logits(whole, "llama"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [{"interval": None, "refresh": 2}, {"interval": None, "coordinates": "white"}])
def test_attention_that_reads_weights_past_its_layers_is_not_sketched(config):
    """torch's MultiheadAttention: neither its own forward pass nor that of out_proj gives what a sketch reads."""
    model = KINDS["attention"].adapted()
    with pytest.raises(ScaloraError, match="is part of torch's MultiheadAttention"):
        scalora.attach(model, adamw(model), config)
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match="is part of torch's MultiheadAttention"):
        handle = scalora.attach(model, optimizer, {**config, "unsupported": "leave"})
    assert [layer.name.rpartition(".")[2] for layer in handle.layers] == ["last"]
    for _ in range(5):
        KINDS["attention"].step(model, optimizer)
    assert handle.refresh is None or handle.refresh.steps == [2, 4]
