"""A base object that has been used before is clean, or it is said that it is not; adapters beside each other."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

import scalora
from helpers import models
from helpers.zoo import KINDS, adamw, same
from scalora import ScaLoraConfig, ScaloraError

pytestmark = pytest.mark.filterwarnings("ignore")
SOME = ["llama", "bert", "gpt2", "names alike", "patterns"]
some_kinds = pytest.mark.parametrize("kind", SOME)
OTHER = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}


def _config(kind, **options):
    return LoraConfig(**{**copy.deepcopy(kind.lora), "r": 2, "lora_alpha": 4, **options})


@some_kinds
@pytest.mark.parametrize("way", ["unload", "delete", "wrapped again"])
def test_with_columns_the_base_is_clean(kind, way):
    kind = KINDS[kind]
    model, _, handle = kind.trained()
    handle.detach()
    untouched = kind.output(kind.adapted())
    if kind is KINDS["bert"] and way != "delete":
        pytest.skip("PEFT leaves the trained head in the base")
    if way == "unload":
        again = get_peft_model(model.unload(), _config(kind))
    elif way == "delete":
        model.add_adapter("other", _config(kind))
        model.set_adapter("other")
        model.delete_adapter("default")
        again = model
        assert not any(".accumulated." in name for name, _ in again.named_parameters())
    else:
        again = get_peft_model(model.get_base_model(), _config(kind))
    if way != "wrapped again":
        same(kind.output(again), untouched)
        return
    plain = get_peft_model(get_peft_model(kind.base(), _config(kind)).get_base_model(), _config(kind))
    same(kind.output(again), kind.output(plain))


@some_kinds
def test_an_adapter_that_is_made_anew_under_the_same_name_has_accumulated_nothing(kind):
    kind = KINDS[kind]
    model, _, handle = kind.trained()
    handle.detach()
    model.add_adapter("other", _config(kind))
    model.set_adapter("other")
    model.delete_adapter("default")
    torch.manual_seed(9)
    model.add_adapter("default", _config(kind, init_lora_weights=False))
    model.set_adapter("default")
    plain = kind.adapted()
    plain.add_adapter("other", _config(kind))
    torch.manual_seed(9)
    plain.delete_adapter("default")
    plain.add_adapter("default", _config(kind, init_lora_weights=False))
    plain.set_adapter("default")
    mine = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        mine[name].data.copy_(parameter.data)
    same(kind.output(model), kind.output(plain))
    optimizer = adamw(model)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    kind.step(model, optimizer)


@some_kinds
def test_a_second_adapter_is_trained_and_the_first_one_stays(kind, tmp_path):
    kind = KINDS[kind]
    model, _, handle = kind.trained()
    handle.detach()
    first = kind.output(model)
    model.add_adapter("other", _config(kind))
    model.set_adapter("other")
    optimizer = adamw(model)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    for _ in range(4):
        kind.step(model, optimizer)
    second = kind.output(model)
    model.set_adapter("default")
    same(kind.output(model), first)
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, first), (tmp_path / "other", second)):
        same(kind.output(PeftModel.from_pretrained(kind.base(), str(folder))), expected)
    model.delete_adapter("default")
    model.set_adapter("other")
    same(kind.output(model), second)


# A base that accumulate='base' has written to.

WRITTEN = "accumulate='base'"


def _native():
    model = models.base("llama").eval()
    model.add_adapter(LoraConfig(**OTHER, target_modules=["q_proj", "v_proj"]), adapter_name="default")
    return model


MODELS = {
    "PeftModel": lambda: KINDS["llama"].adapted(),
    "PeftMixedModel": lambda: get_peft_model(
        models.base("llama").eval(), LoraConfig(**OTHER, target_modules=["q_proj", "v_proj"]), mixed=True
    ),
    "transformers": _native,
    "injected": lambda: inject_adapter_in_model(
        LoraConfig(**OTHER, target_modules=["q_proj", "v_proj"]), models.base("llama").eval()
    ),
}


def _save(model):
    model.save_pretrained("nowhere")


def _switch_off(model):
    if hasattr(model, "base_model") and hasattr(model.base_model, "disable_adapter_layers"):
        with model.disable_adapter():
            pass
    else:
        model.disable_adapters()


def _add(model):
    model.add_adapter("other", LoraConfig(**OTHER, target_modules=["q_proj"])) if hasattr(
        model, "base_model"
    ) and hasattr(model, "peft_type") else inject_adapter_in_model(
        LoraConfig(**OTHER, target_modules=["q_proj"]), model, adapter_name="other"
    )


def _wrap_again(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    get_peft_model(base, LoraConfig(**OTHER, target_modules=["q_proj"]))


def _attach_with_columns(model):
    scalora.attach(model, adamw(model))


USES = {
    "PeftModel": [
        _save, _switch_off, _add, lambda model: model.peft_config["default"].save_pretrained("nowhere"), _wrap_again,
        _save, _attach_with_columns, lambda model: model.unload(), lambda model: model.delete_adapter("default"),
        lambda model: scalora.save_plain_lora(model, "nowhere"),
    ],
    "PeftMixedModel": [_switch_off, _wrap_again, _attach_with_columns, lambda model: model.unload(),
                       lambda model: model.delete_adapter("default")],
    "transformers": [_save, _switch_off, _add, _attach_with_columns, lambda model: model.delete_adapter("default")],
    "injected": [_add, _wrap_again, _attach_with_columns],
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_written_base_is_not_taken_for_the_original_one(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = MODELS[kind]()
    optimizer = adamw(model)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=1, accumulate="base"))
    for _ in range(4):
        KINDS["llama"].step(model, optimizer)
    for after in ("attached", "detached"):
        expected = KINDS["llama"].output(model)
        for use in USES[kind]:
            with pytest.raises(ScaloraError, match=WRITTEN):
                use(model)
            same(KINDS["llama"].output(model), expected, 0)
        assert not list(tmp_path.rglob("adapter*"))
        if after == "attached":
            KINDS["llama"].step(model, optimizer)  # nothing was changed: it goes on
            handle.detach()
    same(KINDS["llama"].output(copy.deepcopy(model)), expected)
    with pytest.raises(ScaloraError, match=WRITTEN):
        USES[kind][0](copy.deepcopy(model))
    if hasattr(model, "merge_and_unload"):
        same(KINDS["llama"].output(model.merge_and_unload()), expected)


def test_columns_are_not_left_beside_a_base_that_is_to_be_written():
    model, optimizer, handle = KINDS["llama"].trained()
    handle.detach()
    expected = KINDS["llama"].output(model)
    with pytest.raises(ScaloraError, match="holds accumulated columns"):
        scalora.attach(model, optimizer, ScaLoraConfig(accumulate="base"))
    same(KINDS["llama"].output(model), expected, 0)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    KINDS["llama"].step(model, optimizer)


def test_a_sum_kept_by_an_earlier_run_does_not_hide_what_is_written_to_the_base():
    model = models.lora("llama", r=2)
    model.add_adapter("other", LoraConfig(**OTHER, target_modules=models.TARGETS["llama"]))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    scalora.attach(model, adamw(model), ScaLoraConfig(interval=1)).detach()
    optimizer = adamw(model)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1, accumulate="base"))
    for step in range(3):
        models.train(model, optimizer, "llama", 1, start=step)
    kept = model(**models.batch("llama")).logits  # in training, as a step computes
    same(kept.detach(), model.eval()(**models.batch("llama")).logits.detach())


def test_a_run_goes_on_with_its_base_in_half_precision():
    """Of 32 bits nothing was lost in rounding, so that a state of such a run has nothing to give back."""
    config = ScaLoraConfig(interval=1, accumulate="base")
    model = models.lora("llama", r=2)
    handle = scalora.attach(model, optimizer := adamw(model), config)
    models.train(model, optimizer, "llama", 3)
    half = models.lora("llama", r=2)
    for layer in handle.layers:
        base = half.get_submodule(layer.name).base_layer
        base.to(torch.bfloat16)
    again = scalora.attach(half, adamw(half), config)
    half.load_state_dict(model.state_dict())
    again.load_state_dict(handle.state_dict())
    assert again.step == 3
    assert not any(lost.any() for lost in again.store.lost.values())
