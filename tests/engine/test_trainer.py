"""One callback, nothing else changes: Trainer, resume, best model."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers import models
from scalora import ScaLoraCallback, ScaLoraConfig, ScaloraError, create_scalora_optimizer


def _dataset(kind="llama", n=48):
    ids = torch.randint(0, models.VOCABULARY, (n, 10), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row[0] % 3 if kind == "bert" else row} for row in ids]


def _arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 1e-3, "logging_steps": 2,
        "report_to": "none",        "use_cpu": True, "save_steps": 6, "seed": 5, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def _trainer(folder, kind="llama", config=None, dataset=None, callbacks=None, **options):
    callback = ScaLoraCallback(ScaLoraConfig(interval=2) if config is None else config)
    dataset = _dataset(kind) if dataset is None else dataset
    return callback, Trainer(
        models.lora(kind),
        _arguments(folder, **options),
        train_dataset=dataset,
        eval_dataset=dataset[:8],
        callbacks=[callback],
    )


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_trainer_with_one_more_line(tmp_path, kind):
    callback, trainer = _trainer(tmp_path, kind, gradient_accumulation_steps=2, bf16=True)
    trainer.train()
    assert [event.step for event in callback.handle.stats] == [0, 2, 4, 6, 8, 10]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(
        {"scalora/alpha", "scalora/beta", "scalora/moved", "scalora/column_share"} <= set(entry) for entry in logged
    )
    assert (tmp_path / "checkpoint-12" / "scalora.safetensors").is_file()


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("accumulate", ["adapter", "base"])
@pytest.mark.parametrize("refresh", [None, 4, "auto"], ids=["events", "refresh", "auto"])
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(tmp_path, kind, accumulate, refresh):
    config = ScaLoraConfig(interval=None if refresh else 2, refresh=refresh, accumulate=accumulate)
    _, whole = _trainer(tmp_path / "whole", kind, config)
    whole.train()
    _, resumed = _trainer(tmp_path / "whole", kind, config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert torch.equal(models.logits(whole.model, kind), models.logits(resumed.model, kind))


def test_a_resumed_run_computes_with_the_columns_in_use_only(tmp_path):
    # With all of them it is the same sum of numbers, some of them zeros, but some processors round it otherwise.
    _trainer(tmp_path)[1].train()
    callback, resumed = _trainer(tmp_path)
    widths = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            widths.append((state.global_step, callback.handle.layers[0].accumulated.used))

    resumed.add_callback(Look())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    rank = callback.handle.layers[0].rank
    assert widths[0] == (6, 3 * rank)  # events at steps 0, 2 and 4


@pytest.mark.parametrize("step", [6, 10])  # at 10 all five slots are in use, at the end only two
def test_the_best_model_comes_back_with_its_accumulated_update(tmp_path, step):
    _, trainer = _trainer(
        tmp_path, config=ScaLoraConfig(interval=2, capacity=4), load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=step, save_steps=step, metric_for_best_model="loss", greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    outputs = {}
    save = trainer._save_checkpoint

    def remember(*args, **kwargs):
        outputs[trainer.state.global_step] = models.logits(trainer.model, "llama")
        return save(*args, **kwargs)

    trainer._save_checkpoint = remember
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert best == step  # greater_is_better on the loss: not the last one
    torch.testing.assert_close(models.logits(trainer.model, "llama"), outputs[best], rtol=0, atol=0)


def test_resuming_from_a_foreign_checkpoint_says_so(tmp_path):
    plain = Trainer(models.lora("llama"), _arguments(tmp_path), train_dataset=_dataset())
    plain.train()
    _, trainer = _trainer(tmp_path)
    with pytest.raises(ScaloraError, match=r"scalora\.safetensors is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize(("steps", "every"), [(12, 3), (100, 25), (150, 37), (500, 50)])
def test_the_length_of_the_run_says_how_often_to_refresh(tmp_path, steps, every):
    callback, trainer = _trainer(tmp_path, config={"interval": None, "refresh": "auto"}, max_steps=steps)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer.add_callback(Stop())
    trainer.train()
    assert callback.handle.refresh.every == every


def test_a_refresh_that_would_never_come_is_refused(tmp_path):
    _, trainer = _trainer(tmp_path, config=ScaLoraConfig(interval=None, refresh=12))
    with pytest.raises(ScaloraError, match="refresh is 12, but training has 12 steps"):
        trainer.train()


def test_resuming_with_another_configuration_says_so(tmp_path):
    _trainer(tmp_path)[1].train()
    _, trainer = _trainer(tmp_path, config=ScaLoraConfig(interval=3))
    with pytest.raises(ScaloraError, match="interval is 3"):
        trainer.train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_says_so(tmp_path):
    _trainer(tmp_path)[1].train()
    path = tmp_path / "checkpoint-12" / "scalora.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    _, trainer = _trainer(tmp_path, max_steps=14)
    with pytest.raises(ScaloraError, match="damaged"):
        trainer.train(resume_from_checkpoint=True)


def test_a_model_without_lora_is_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ScaloraError, match="no trainable LoRA layer"):
        Trainer(models.base("llama"), _arguments(tmp_path), train_dataset=_dataset(), callbacks=[ScaLoraCallback()])


def test_the_optimizer_factory_works_in_trainer(tmp_path):
    model = models.lora("llama")
    optimizer = create_scalora_optimizer(
        model, torch.optim.AdamW, lr=1e-3, config=ScaLoraConfig(interval=3), weight_decay=0.01
    )
    assert type(optimizer) is torch.optim.AdamW
    before = models.logits(model, "llama")
    Trainer(model, _arguments(tmp_path), train_dataset=_dataset(), optimizers=(optimizer, None)).train()
    assert not torch.equal(models.logits(model, "llama"), before)
    assert any("accumulated" in name and param.any() for name, param in model.named_parameters())
