"""The optimizers that transformers' Trainer makes by name: carried along and resumed bitwise, or refused by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import scalora
from helpers import models
from scalora import ScaLoraConfig, ScaloraError

# Name → the library that it needs, and what it needs of ScaLoraConfig.
WORKS = {
    "adamw_torch": ("torch", {}),
    "adamw_torch_fused": ("torch", {}),
    "sgd": ("torch", {}),
    "adagrad": ("torch", {}),
    "rmsprop": ("torch", {}),
    "adafactor": ("torch", {"scaling": "scalar"}),
    "stable_adamw": ("optimi", {}),
    "adamw_torch_8bit": ("torchao", {}),
    "adamw_torch_4bit": ("torchao", {}),
    "adamw_8bit": ("bitsandbytes", {}),
    "adamw_bnb_8bit": ("bitsandbytes", {}),
    "paged_adamw_32bit": ("bitsandbytes", {}),
    "paged_adamw_8bit": ("bitsandbytes", {}),
    "ademamix": ("bitsandbytes", {}),
    "ademamix_8bit": ("bitsandbytes", {}),
    "paged_ademamix_32bit": ("bitsandbytes", {}),
    "paged_ademamix_8bit": ("bitsandbytes", {}),
    "lion_32bit": ("bitsandbytes", {}),
    "lion_8bit": ("bitsandbytes", {}),
    "paged_lion_32bit": ("bitsandbytes", {}),
    "paged_lion_8bit": ("bitsandbytes", {}),
    "rmsprop_bnb": ("bitsandbytes", {}),
    "rmsprop_bnb_8bit": ("bitsandbytes", {}),
    "rmsprop_bnb_32bit": ("bitsandbytes", {}),
}
REFUSED = {
    "schedule_free_adamw": ("schedulefree", "since it evaluates an average of points"),
    "schedule_free_radam": ("schedulefree", "since it evaluates an average of points"),
    "schedule_free_sgd": ("schedulefree", "since it evaluates an average of points"),
}
NOT_TRIED = {
    "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "grokadamw", "lomo", "adalomo",
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _eager():
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps
        yield


def _trainer(name, folder, config, steps=6):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=models.VOCABULARY, **sizes))
    # 4096 entries and more of the wide matrices: those are quantised, the others are not.
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "up_proj"]))
    rows = [{"input_ids": row, "labels": row} for seed in range(4) for row in models.batch("llama", seed)["input_ids"]]
    arguments = TrainingArguments(
        folder, optim=name, max_steps=steps, save_steps=3, learning_rate=1e-3, per_device_train_batch_size=4,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=3, logging_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    callback = scalora.ScaLoraCallback(ScaLoraConfig(interval=1, **config))
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback]), callback


@pytest.mark.parametrize("case", WORKS)
def test_carried_along(case, tmp_path):
    library, config = WORKS[case]
    pytest.importorskip(library)
    trainer, callback = _trainer(case, tmp_path, config)
    trainer.train()
    assert len(callback.handle.stats) == 6
    assert max(event.moved for event in callback.handle.stats) > 1e-4
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert all(torch.isfinite(torch.tensor(losses)))
    again, _ = _trainer(case, tmp_path, config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, p), q in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("case", REFUSED)
def test_not_carried_along(case, tmp_path):
    library, words = REFUSED[case]
    pytest.importorskip(library)
    trainer, _ = _trainer(case, tmp_path, {})
    with pytest.raises(ScaloraError, match=words):
        trainer.train()


def test_adafactor_wants_one_factor(tmp_path):
    trainer, _ = _trainer("adafactor", tmp_path, {})
    with pytest.raises(ScaloraError, match=r"exp_avg_sq_row.*scaling='scalar'"):
        trainer.train()


def test_every_name_is_listed():
    assert {name.value for name in OptimizerNames} == {*WORKS, *REFUSED, *NOT_TRIED}
