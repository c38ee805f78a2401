"""The Theorem-1 oracle: nothing of its rank does better, and an event keeps function and gradients consistent."""

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from helpers import models, training
from scalora import ScaloraError
from scalora.algebra.gram import gram_products
from scalora.algebra.scaling import calibrate
from scalora.engine.plain_lora import joined_factors
from scalora.layers.peft_lora import find_layers


class _Watch(TrainerCallback):
    """What the function and the gradients are around every optimizer step."""

    def __init__(self, model, kind, first):
        self.model, self.kind, self.first = model, kind, first
        self.updates, self.gradients, self.pairs, self.steps = [], [], [], []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.inner = optimizer.optimizer
        self.inner.register_step_pre_hook(self._look)

    @torch.no_grad()
    def _look(self, *_):
        layers = find_layers(self.model)
        self.updates.append([P @ Q.T for P, Q in map(joined_factors, layers)])
        self.gradients.append([(x.A.grad.clone(), x.Bt.grad.clone()) for x in layers])
        self.pairs.append([(x.A.clone(), x.Bt.clone()) for x in layers])
        self.steps.append([int(self.inner.state.get(x.A, {}).get("step", 0)) for x in layers])


def _run(tmp_path, kind="llama", steps=6, max_grad_norm=0.0, dataset=None, **options):
    adapted = training.adapt("scalora-oracle", kind, tmp_path / "base", options={"interval": 2, **options})
    first, last = _Watch(adapted.model, kind, True), _Watch(adapted.model, kind, False)
    made = training.trainer(
        adapted, kind, tmp_path / "out", max_steps=steps, learning_rate=5e-3, max_grad_norm=max_grad_norm,
        dataset=dataset,
    )  # fmt: skip
    made.callback_handler.callbacks.insert(0, first)
    made.callback_handler.callbacks.append(last)
    made.train()
    return adapted, made, first, last


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_event_keeps_the_function_and_resets_the_state(kind, tmp_path):
    _, _, before, after = _run(tmp_path, kind)
    for step in range(6):
        event = step % 2 == 0
        for old, new in zip(before.updates[step], after.updates[step], strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
        assert after.steps[step] == [0 if event else 1] * len(after.steps[step])
        changed = [not torch.equal(a, b) for (a, _), (b, _) in zip(before.pairs[step], after.pairs[step], strict=True)]
        assert all(changed) == event
        assert any(changed) == event


def test_the_new_gradients_are_those_of_the_new_adapters(tmp_path):
    rows = training.rows("llama", n=4)  # one batch, always the same
    adapted, _, _, last = _run(tmp_path, steps=1, dataset=rows)
    layers = find_layers(adapted.model)
    with torch.no_grad():
        for layer, (A, Bt) in zip(layers, last.pairs[0], strict=True):  # as they were before the optimizer's step
            layer.A.copy_(A)
            layer.Bt.copy_(Bt)
    adapted.model.zero_grad()
    ids = torch.stack([row["input_ids"] for row in rows])
    adapted.model(input_ids=ids, labels=ids).loss.backward()
    for layer, (of_A, of_Bt) in zip(layers, last.gradients[0], strict=True):
        torch.testing.assert_close(of_A, layer.A.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(of_Bt, layer.Bt.grad, rtol=1e-3, atol=1e-6)


def test_c_is_what_calibration_at_the_start_would_give(tmp_path):
    """With lora_B = 0 and gradients without a preferred direction: c/s² = p_B/n_A in expectation."""
    adapted = training.adapt("scalora-oracle", "llama", tmp_path / "base")
    for layer, c in zip(find_layers(adapted.model), adapted.callbacks[0].constants, strict=True):
        A, B = torch.zeros(1000, 4), layer.Bt.detach().mT
        gram = gram_products(A, B, torch.randn(1000, 4), torch.zeros_like(B))
        assert c == pytest.approx(float(calibrate(gram)), rel=0.1)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_saved_adapter_merges_into_the_untouched_base(kind, tmp_path):
    base = training.base(kind, tmp_path / "base")
    adapted, _, _, _ = _run(tmp_path, kind, steps=9, interval=1)
    frozen = {n.replace(".base_layer", ""): p for n, p in adapted.model.get_base_model().named_parameters()}
    assert all(torch.equal(p, frozen[n]) for n, p in base.named_parameters() if n in frozen)
    assert not any(
        p.requires_grad or p.grad is not None for n, p in adapted.model.named_parameters() if "base_layer" in n
    )
    assert float(adapted.callbacks[0].store.discarded.max()) < 1e-8
    adapted.save(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    torch.testing.assert_close(models.logits(merged, kind), models.logits(adapted.model, kind), rtol=0, atol=1e-5)


def test_gradients_gather_over_accumulation_steps(tmp_path):
    """Two half batches give the adapters that one whole batch gives."""
    rows, pairs = training.rows("llama", n=4), []
    for size, pieces in ((4, 1), (2, 2)):
        adapted = training.adapt("scalora-oracle", "llama", tmp_path / "base")
        made = training.trainer(
            adapted, "llama", tmp_path / "out", dataset=rows, max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=pieces, learning_rate=0.0,
        )  # fmt: skip
        made.train()
        pairs.append([(x.A.abs().clone(), x.Bt.abs().clone()) for x in find_layers(adapted.model)])
    for (A, Bt), (other_A, other_Bt) in zip(*pairs, strict=True):
        torch.testing.assert_close(A, other_A, rtol=0, atol=1e-3)
        torch.testing.assert_close(Bt, other_Bt, rtol=0, atol=1e-3)


def test_the_new_gradients_are_clipped_as_the_old_ones_were(tmp_path):
    _, _, _, last = _run(tmp_path, steps=1, max_grad_norm=0.01)
    assert sum(float(g.square().sum()) for pair in last.gradients[0] for g in pair) <= 0.01**2 * 1.001


def test_fp16_is_refused():
    callback = training.method("scalora-oracle").adapt(models.base("llama"), "causal-lm").callbacks[0]
    arguments = type("Arguments", (), {"fp16": True})()
    state = type("State", (), {"global_step": 0})()
    with pytest.raises(ScaloraError, match="fp16"):
        callback.on_train_begin(arguments, state, None)
