"""A resumed run whose handle was given no state is said to be another run; nobody else is warned."""

import copy
import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

import scalora
from helpers import models
from helpers.attached import attached

WORDS = "handle.load_state_dict was not called"


@pytest.fixture(params=["adapter", "base"])
def saved(request):
    """A store, and the states of a run that has had events."""
    model, optimizer, handle = attached(accumulate=request.param, lr=1e-2)
    models.train(model, optimizer, "llama", 3)
    states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), handle.state_dict()
    return request.param, states


def _again(saved, *, attach_last=False, optimizer_state=True):
    accumulate, (weights, moments, _) = saved
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    config = {"interval": 1, "accumulate": accumulate}
    if attach_last:
        scalora.prepare(model, config)
    handle = None if attach_last else scalora.attach(model, optimizer, config)
    model.load_state_dict(weights)
    if optimizer_state:
        optimizer.load_state_dict(moments)
    return model, optimizer, handle or scalora.attach(model, optimizer, config)


@pytest.mark.parametrize("attach_last", [False, True])
def test_a_loop_that_forgets_the_handle_is_warned_once(saved, attach_last):
    model, optimizer, _ = _again(saved, attach_last=attach_last)
    with pytest.warns(UserWarning, match=WORDS) as found:
        models.train(model, optimizer, "llama", 3)
    assert len([w for w in found if WORDS in str(w.message)]) == 1


def test_a_trainer_that_resumes_with_the_optimizer_alone_is_warned(tmp_path):
    def trainer():
        model = models.lora("llama")
        optimizer = scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=1e-3, config={"interval": 1})
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
        )
        rows = [{"input_ids": row, "labels": row} for row in models.batch("llama")["input_ids"].repeat(8, 1)]
        return Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))  # pyright: ignore

    trainer().train()
    with pytest.warns(UserWarning, match=f"{WORDS}.*ScaLoraCallback"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_nobody_else_is_warned(saved):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{WORDS}")
        model, optimizer, handle = _again(saved)
        handle.load_state_dict(saved[1][2])
        models.train(model, optimizer, "llama", 2)
        handle.detach()
        scalora.attach(model, optimizer, handle.config)  # the same optimizer again
        models.train(model, optimizer, "llama", 2)
        model, optimizer, _ = _again(saved, optimizer_state=False)  # a new phase
        models.train(model, optimizer, "llama", 2)
        model = models.lora("llama")
        optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
        models.train(model, optimizer, "llama", 2)  # plain LoRA first
        scalora.attach(model, optimizer, handle.config)
        models.train(model, optimizer, "llama", 2)
