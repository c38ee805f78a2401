"""Callbacks that average weights, on a Trainer that knows ScaLoRA by its optimizer alone."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers import models
from scalora import ScaloraError, create_scalora_optimizer

WRITTEN = "were written to, in a copy or past the attached optimizer"


class _Mean(TrainerCallback):
    """A running mean of what is trained, put into the model at the end."""

    mean = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.mean = {name: (self.mean or now)[name].lerp(value, 0.5) for name, value in now.items()}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.put(model, self.mean)

    def put(self, model, mean):
        raise NotImplementedError


class _ByData(_Mean):
    def put(self, model, mean):
        for name, value in mean.items():
            model.get_parameter(name).data.copy_(value)


class _InPlace(_Mean):
    @torch.no_grad()
    def put(self, model, mean):
        for name, value in mean.items():
            model.get_parameter(name).copy_(value)


class _Exchanged(_Mean):
    def put(self, model, mean):
        for name, value in mean.items():
            model.get_parameter(name).data = value


class _Loaded(_Mean):
    def put(self, model, mean):
        model.load_state_dict(mean, strict=False)


class _AveragedModel(TrainerCallback):
    average = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average = self.average or AveragedModel(model)
        self.average.update_parameters(model)

    def on_train_end(self, args, state, control, **kwargs):
        models.logits(self.average.module, "llama")  # pyright: ignore


CALLBACKS = {
    "data": (_ByData, WRITTEN),
    "in-place": (_InPlace, WRITTEN),
    "exchanged": (_Exchanged, WRITTEN),
    "load-state-dict": (_Loaded, "has the 4 trained columns only"),
    "AveragedModel": (_AveragedModel, WRITTEN),
}


@pytest.mark.parametrize("case", CALLBACKS)
def test_a_mean_of_factors_on_a_trainer_is_refused(case, tmp_path):
    model = models.lora("llama")
    optimizer = create_scalora_optimizer(model, torch.optim.AdamW, lr=1e-2, config={"interval": 1})
    callback, words = CALLBACKS[case]
    rows = [{"input_ids": row, "labels": row} for row in models.batch("llama")["input_ids"].repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    optimizers: tuple = (optimizer, None)
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=optimizers, callbacks=[callback()])

    def train_and_use():
        trainer.train()
        models.logits(model, "llama")

    with pytest.raises(ScaloraError, match=words):
        train_and_use()
    if case in ("data", "in-place", "exchanged"):  # nor is the mean saved
        with pytest.raises(ScaloraError, match=words):
            model.save_pretrained(str(tmp_path / "adapter"))
