"""α-LoRA: its forward pass, and that α learns from held-out rows only while the rest never sees them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import TrainerCallback

from helpers import models, training
from helpers.two_processes import spawn
from scalora import ScaloraError
from scalora.methods.alpha_lora import AlphaLoraLinear
from scalora.methods.support.wrappers import merge

sizes = st.integers(3, 30)


def _random_layer(m, n, rank, bias, scale):
    layer = AlphaLoraLinear(nn.Linear(n, m, bias=bias), rank, scale)
    for param in (layer.lora_A, layer.lora_B, layer.alpha):
        nn.init.normal_(param)
    return layer


@given(m=sizes, n=sizes, rank=st.integers(1, 3), bias=st.booleans(), scale=st.floats(0.1, 4))
def test_the_forward_pass_is_the_definition(m, n, rank, bias, scale):
    layer = _random_layer(m, n, rank, bias, scale)
    W, b, x = layer.base.weight, layer.base.bias, torch.randn(n)
    expected = torch.stack([
        layer.alpha[i] * (W[i] @ x + (b[i] if bias else 0)) + scale * layer.lora_B[i] @ (layer.lora_A @ x)
        for i in range(m)
    ])  # fmt: skip
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@given(m=sizes, n=sizes, rank=st.integers(1, 3), bias=st.booleans())
def test_merging_is_exact_bias_included(m, n, rank, bias):
    model = nn.Sequential(_random_layer(m, n, rank, bias, 2.0))
    x = torch.randn(4, n)
    before = model(x)
    torch.testing.assert_close(merge(model)(x), before, rtol=1e-5, atol=1e-4)


@given(m=sizes, n=sizes, rank=st.integers(1, 3))
def test_it_starts_as_the_frozen_layer(m, n, rank):
    base = nn.Linear(n, m)
    x = torch.randn(2, n)
    assert torch.equal(AlphaLoraLinear(base, rank, 2.0)(x), base(x))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_trained_merged_and_saved(kind, tmp_path):
    adapted = training.adapt("alpha-lora", kind, tmp_path / "base", options={"every": 2})
    training.trainer(adapted, kind, tmp_path / "out", learning_rate=5e-3).train()
    after = models.logits(adapted.model, kind)
    assert torch.equal(models.logits(training.run_lines(adapted.save(tmp_path / "adapter")), kind), after)
    torch.testing.assert_close(models.logits(merge(adapted.model), kind), after, rtol=0, atol=1e-5)


class _Watch(TrainerCallback):
    """Records α after every step, and whether the main optimizer holds one."""

    def __init__(self, alphas):
        self.alphas, self.seen, self.in_optimizer = alphas, [], False

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.in_optimizer = any(id(alpha) in held for alpha in self.alphas)

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(torch.cat([alpha.detach().clone() for alpha in self.alphas]))


def test_alpha_moves_every_t_steps_outside_the_main_optimizer(tmp_path):
    adapted = training.adapt("alpha-lora", "llama", tmp_path / "base", options={"every": 3, "lr": 0.01})
    watch = _Watch(adapted.callbacks[0].alphas)
    training.trainer(adapted, "llama", tmp_path / "out", max_steps=8, callbacks=[watch]).train()
    assert not watch.in_optimizer
    ones = torch.ones_like(watch.seen[0])
    moved = [not torch.equal(now, before) for before, now in zip([ones, *watch.seen], watch.seen, strict=False)]
    assert moved == [True, False, False, True, False, False, True, False]
    assert (watch.seen[0] - 1).abs().max() == pytest.approx(0.01, rel=1e-2)  # Adam's first step has its lr's size
    assert not any(alpha.requires_grad or alpha.grad is not None for alpha in watch.alphas)


def test_training_and_alpha_share_no_row(tmp_path):
    dataset = [{"input_ids": torch.full((10,), i), "labels": torch.full((10,), i)} for i in range(30)]
    adapted = training.adapt("alpha-lora", "llama", tmp_path / "base", options={"every": 1, "share": 0.3})
    made = training.trainer(adapted, "llama", tmp_path / "out", dataset=dataset, max_steps=12)
    trained, held_out = set(), set()
    loss = made.compute_loss

    def remember(model, inputs, *args, **kwargs):
        trained.update(inputs["input_ids"][:, 0].tolist())
        return loss(model, inputs, *args, **kwargs)

    made.compute_loss = remember
    collate, callback = made.data_collator, adapted.callbacks[0]
    rows = callback._rows
    callback._rows = lambda update, seed: [
        held_out.add(int(callback.held_out[i]["input_ids"][0])) or i for i in rows(update, seed)
    ]
    made.train()
    assert collate is made.data_collator
    assert len(held_out) == 9  # every one of them is used in turn
    assert len(trained) == 21
    assert not trained & held_out


def test_too_few_rows_to_hold_any_out(tmp_path):
    adapted = training.adapt("alpha-lora", "llama", tmp_path / "base", options={"batch": 64})
    with pytest.raises(ScaloraError, match=r"64 of 24 .*batch"):
        training.trainer(adapted, "llama", tmp_path / "out")


def test_training_without_holding_out_is_refused(tmp_path):
    adapted = training.adapt("alpha-lora", "llama", tmp_path / "base")
    adapted.split_train = None
    with pytest.raises(ScaloraError, match="split_train"):
        training.trainer(adapted, "llama", tmp_path / "out").train()


def test_dropout_of_the_run_does_not_depend_on_alpha(tmp_path):
    """The random numbers of the training steps are the same however often α is updated."""
    drawn = []
    for every in (1, 100):
        adapted = training.adapt("alpha-lora", "llama", tmp_path / "base", options={"every": every}, dropout=0.3)
        training.trainer(adapted, "llama", tmp_path / "out", max_steps=4).train()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def _train_beside(rank, folder):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, models.VOCABULARY, (length,), generator=generator) for length in (*range(6, 18),) * 2]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    adapted = training.adapt("alpha-lora", "llama", folder / "base", options={"batch": 1, "every": 1}, dropout=0.5)
    training.trainer(adapted, "llama", folder / "out", dataset=rows, per_device_train_batch_size=1, max_steps=4).train()
    torch.save([alpha.detach() for alpha in adapted.callbacks[0].alphas], folder / f"{rank}.pt")


def test_two_processes_have_one_alpha_whatever_dropout_draws_in_each(tmp_path):
    training.base("llama", tmp_path / "base")
    spawn(_train_beside, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert any((alpha != 1).any() for alpha in one)
