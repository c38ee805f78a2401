"""Steps after a refresh are shortened: the optimizer's update, and nothing that an event does before it."""

import pytest
import torch

import scalora
from helpers import models
from scalora import ScaLoraConfig


@pytest.mark.parametrize("coordinates", ["plain", "white"])
@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_columns_that_are_rescaled_in_a_shortened_step_keep_the_function(accumulate, coordinates):
    model = models.lora("llama", r=2)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
    config = ScaLoraConfig(interval=1, refresh=12, accumulate=accumulate, coordinates=coordinates)
    handle = scalora.attach(model, optimizer, config)
    models.train(model, optimizer, "llama", 13)
    assert handle.refresh.since < handle.refresh.warmup - 1  # the next step is shortened too
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the event alone
    before = models.logits(model, "llama")
    models.train(model, optimizer, "llama", 1, start=13)
    assert [event.step for event in handle.stats][-1] == 13
    assert handle.stats[-1].moved > 1e-3
    assert (models.logits(model, "llama") - before).abs().max() < 1e-5
