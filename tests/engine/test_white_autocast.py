"""A step in white coordinates is exact wherever it is called."""

import torch

import scalora
from helpers import models
from scalora import ScaLoraConfig


def test_a_step_that_is_called_inside_autocast_is_taken_back_in_full_precision():
    states = []
    for lowered in (False, True):
        model = models.lora("llama", r=2)
        optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
        scalora.attach(model, optimizer, ScaLoraConfig(interval=None, coordinates="white"))
        for step in range(4):
            model(**models.batch("llama", step)).loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
                optimizer.step()
            optimizer.zero_grad()
        states.append(models.logits(model, "llama"))
    assert torch.equal(*states)
