"""TRL's trainers take the reference policy from the trained model itself: it must stay what it was."""

import copy

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from helpers import tokenized
from scalora import ScaLoraCallback, ScaLoraConfig, ScaloraError
from scalora.layers.peft_lora import find_layers, find_peft_model

trl = pytest.importorskip("trl")

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def _arguments(cls, folder, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none",
        "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1,
    }  # fmt: skip
    return cls(**{**defaults, **options})


def _pairs():
    words = tokenized.WORDS
    rows = [
        {"prompt": words[i % 9], "chosen": f" {words[(i + 1) % 9]} yes", "rejected": f" {words[(i + 2) % 9]} no"}
        for i in range(16)
    ]
    return datasets.Dataset.from_list(rows)


def _dpo(model, folder, peft_config=None, accumulate="adapter", **options):
    callback = ScaLoraCallback(ScaLoraConfig(interval=1, accumulate=accumulate))
    trainer = trl.DPOTrainer(
        model, ref_model=None, args=_arguments(trl.DPOConfig, folder, **options), train_dataset=_pairs(),
        processing_class=tokenized.tokenizer(), peft_config=peft_config, callbacks=[callback],
    )  # fmt: skip
    return trainer, callback


@torch.no_grad()
def _reference_agrees(trainer, untouched):
    """The trainer's own reference path, against the model as it was before training."""
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    logp = untouched.eval()(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    expected = (logp.gather(-1, ids[:, 1:, None])[..., 0] * mask).sum(1)
    torch.testing.assert_close(torch.cat([chosen, rejected]), expected, rtol=0, atol=1e-5)


def _took_part(trainer, callback):
    """The accumulated update is in the function that was trained, and gathered no gradient."""
    assert max(event.moved for event in callback.handle.stats) > 1e-3
    module = callback.handle.layers[0].module
    assert module.accumulated["default"].used > 0
    assert all(p.grad is None for n, p in trainer.model.named_parameters() if ".accumulated." in n)


@pytest.mark.parametrize("how", ["new-adapter", "ready-adapter"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_dpo_keeps_its_reference(how, checkpointing, tmp_path):
    """A ready PEFT model: TRL copies its adapter, as trained so far, to one named "ref" and switches to and fro."""
    base = tokenized.llama()
    if how == "ready-adapter":
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        untouched = copy.deepcopy(model)
    else:
        model, untouched = base, copy.deepcopy(base)
    trainer, callback = _dpo(
        model, tmp_path, LORA if how == "new-adapter" else None, gradient_checkpointing=checkpointing
    )
    trainer.train()
    _took_part(trainer, callback)
    _reference_agrees(trainer, untouched)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_dpo_on_a_model_that_has_accumulated_before_keeps_it_as_its_reference(tmp_path):
    trainer, _ = _dpo(tokenized.llama(), tmp_path, LORA)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "before")
    untouched = PeftModel.from_pretrained(tokenized.llama(), tmp_path / "before")
    again, callback = _dpo(trainer.model, tmp_path)
    again.train()
    _took_part(again, callback)
    _reference_agrees(again, untouched)


@pytest.mark.parametrize(
    ("how", "message"),
    [("new-adapter", "would not give the untouched base"), ("ready-adapter", "would change adapter 'ref' too")],
)
def test_dpo_with_a_written_base_is_refused(how, message, tmp_path):
    ready = how == "ready-adapter"
    model = get_peft_model(tokenized.llama(), LORA) if ready else tokenized.llama()
    trainer, _ = _dpo(model, tmp_path, None if ready else LORA, "base")
    with pytest.raises(ScaloraError, match=message):
        trainer.train()


def test_grpo(tmp_path):
    """An online trainer: generation, the reference's log-probabilities and the step take turns on one model."""
    base = tokenized.llama()
    untouched = copy.deepcopy(base)
    callback = ScaLoraCallback(ScaLoraConfig(interval=1))
    references = []
    trainer = trl.GRPOTrainer(
        base,
        reward_funcs=lambda completions, **kwargs: [float(len(set(text.split()))) for text in completions],
        args=_arguments(
            trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=6, beta=0.1, max_steps=3,
        ),
        train_dataset=_pairs().select_columns(["prompt"]), processing_class=tokenized.tokenizer(), peft_config=LORA,
        callbacks=[callback],
    )  # fmt: skip
    generate = trainer._generate_and_score_completions

    def remember(inputs):
        references.append(out := generate(inputs))
        return out

    trainer._generate_and_score_completions = remember
    trainer.train()
    _took_part(trainer, callback)
    assert len(references) == 3
    for out in references:  # of the trainer's own making, the last of them after events
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
        attention = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
        with torch.no_grad():
            logp = untouched.eval()(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
        expected = logp.gather(-1, ids[:, 1:, None])[..., 0][:, -out["completion_ids"].shape[1] :]
        mask = out["completion_mask"].bool()
        torch.testing.assert_close(out["ref_per_token_logps"][mask], expected[mask], rtol=0, atol=1e-4)
    assert find_peft_model(trainer.model, find_layers(trainer.model)).active_adapters == ["default"]


def test_sft(tmp_path):
    callback = ScaLoraCallback(ScaLoraConfig(interval=2))
    texts = datasets.Dataset.from_dict({"text": [" ".join(tokenized.WORDS[i % 9 : i % 9 + 6]) for i in range(16)]})
    trainer = trl.SFTTrainer(
        tokenized.llama(), args=_arguments(trl.SFTConfig, tmp_path, max_length=16, max_steps=6), train_dataset=texts,
        processing_class=tokenized.tokenizer(), peft_config=LORA, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert [event.step for event in callback.handle.stats] == [0, 2, 4]
    assert all("scalora/alpha" in entry for entry in trainer.state.log_history if "loss" in entry)
    _took_part(trainer, callback)
