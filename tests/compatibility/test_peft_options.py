"""Options of PEFT's LoraConfig: each works exactly, to the exported adapter, or is refused by name."""

import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import scalora
from helpers import models
from helpers.attached import attached, run
from scalora import ScaloraError

WORKS = {
    "rank_pattern": ("llama", {"rank_pattern": {"v_proj": 2, "layers.0.mlp.up_proj": 6}}),
    "alpha_pattern": ("llama", {"alpha_pattern": {"v_proj": 32}}),
    "use_rslora": ("llama", {"use_rslora": True}),
    "lora_dropout": ("llama", {"lora_dropout": 0.1}),
    "layers_to_transform": ("llama", {"layers_to_transform": [1]}),
    "exclude_modules": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}),
    "ensure_weight_tying": ("llama", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "trainable_token_indices": ("llama", {"trainable_token_indices": [1, 2, 3]}),
    "bias-lora_only": ("bert", {"bias": "lora_only"}),
    "bias-all": ("bert", {"bias": "all"}),
    "init-gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "init-orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "init-false": ("llama", {"init_lora_weights": False}),
    "target_parameters": ("llama", {"target_parameters": ["o_proj.weight"]}),
}
REFUSED = {
    "use_dora": ("llama", {"use_dora": True}, "DoraLinearVariant"),
    "alora_invocation_tokens": ("llama", {"alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
    "init-mica": ("llama", {"init_lora_weights": "mica"}, "MiCA|trains only one"),
    "lora_bias": ("bert", {"lora_bias": True}, "lora_bias=True"),
}
EXPORT_REFUSED = ["pissa", "olora"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", WORKS)
def test_works(case, tmp_path):
    kind, options = WORKS[case]
    model = models.lora(kind, **options)
    run(model, kind=kind)
    expected = models.logits(model, kind)
    scalora.save_plain_lora(model, tmp_path / "plain")
    again = PeftModel.from_pretrained(models.base(kind), tmp_path / "plain")
    torch.testing.assert_close(models.logits(again, kind), expected, rtol=0, atol=1e-5)
    merged = models.logits(model.merge_and_unload(), kind)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    kind, options, message = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.lora(kind, **options)
    with pytest.raises(ScaloraError, match=message):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)))
    assert "accumulated" not in model.peft_config


@pytest.mark.parametrize("init", EXPORT_REFUSED)
def test_an_initialisation_that_changes_the_base_trains_but_is_no_plain_lora(init, tmp_path):
    model = models.lora("llama", init_lora_weights=init)
    run(model)
    with pytest.raises(ScaloraError, match=f"init_lora_weights='{init}'"):
        scalora.save_plain_lora(model, tmp_path / "plain")
    expected = models.logits(model, "llama")
    torch.testing.assert_close(models.logits(model.merge_and_unload(), "llama"), expected, rtol=0, atol=1e-5)


def test_tied_adapters_are_refused():
    model = models.lora("llama")
    first, second = (model.get_submodule(f"base_model.model.model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    second.lora_A["default"] = first.lora_A["default"]
    with pytest.raises(ScaloraError, match="shares its adapter with another layer"):
        scalora.attach(model, torch.optim.AdamW(models.trainable(model)))


def test_orthogonal_columns_and_an_odd_number_of_accumulated_ones_load(tmp_path):
    """PEFT makes orthogonal columns in pairs, and makes them before it loads others over them."""
    model, optimizer, _ = attached(lora={"init_lora_weights": "orthogonal"}, capacity=5)
    models.train(model, optimizer, "llama", 9)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.base("llama"), tmp_path)
    assert any(module.r["default"] % 2 for module in loaded.modules() if isinstance(module, LoraLayer))
    torch.testing.assert_close(models.logits(loaded, "llama"), models.logits(model, "llama"), rtol=0, atol=1e-5)
    model.add_weighted_adapter(["default"], [1.0], "twin", combination_type="cat")
    model.set_adapter("twin")
    torch.testing.assert_close(models.logits(model, "llama"), models.logits(loaded, "llama"), rtol=0, atol=1e-5)
