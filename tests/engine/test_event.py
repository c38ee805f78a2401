"""The hook on real (tiny) models: when it fires, what it leaves alone, how it is saved."""

import pytest
import torch
from torch import nn

import scalora
from helpers import models
from helpers.attached import accumulated, attached, watch
from scalora import ScaLoraConfig

KINDS, STORES = ("llama", "bert", "gpt2"), ("adapter", "base")


def test_interval_counts_optimizer_steps():
    model, optimizer, handle = attached(interval=3)
    for step in range(8):
        for micro in range(2):  # gradient accumulation
            model(**models.batch("llama", 2 * step + micro)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [event.step for event in handle.stats] == [0, 3, 6]


def test_the_first_event_of_fresh_adapters_moves_nothing_and_calibrates():
    model, _optimizer, handle = attached()
    start = models.logits(model, "llama")
    model(**models.batch("llama")).loss.backward()
    handle.rescale()
    assert torch.equal(models.logits(model, "llama"), start)
    # Kaiming-uniform(a=√5) has variance 1/(3n): squared column norms of 1/3, which the gradients weigh a little.
    assert ((handle.constants > 0.15) & (handle.constants < 0.7)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_non_finite_gradients_moves_nothing(bad):
    model, optimizer, handle = attached()
    models.train(model, optimizer, "llama", 3)
    model(**models.batch("llama")).loss.backward()
    models.trainable(model)[0].grad[0, 0] = bad
    before = [(layer.A.clone(), layer.Bt.clone(), accumulated(layer)) for layer in handle.layers]
    handle.rescale()
    for layer, (A, Bt, moved) in zip(handle.layers, before, strict=True):
        assert torch.equal(layer.A, A)
        assert torch.equal(layer.Bt, Bt)
        assert torch.equal(accumulated(layer), moved)
    assert handle.stats[-1].shares == {"none": 1.0}
    assert handle.stats[-1].moved == 0


def test_a_step_that_a_grad_scaler_skips_moves_nothing():
    """Fused optimizers own loss scaling: their step runs with scaled gradients, and on overflow steps too."""
    model, optimizer, handle = attached(opt={"fused": True})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    reference, plain, _ = attached(opt={"fused": True})
    for step in range(4):
        scaler.scale(model(**models.batch("llama", step)).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    models.train(reference, plain, "llama", 4)
    torch.testing.assert_close(models.logits(model, "llama"), models.logits(reference, "llama"), rtol=1e-3, atol=1e-4)
    before = models.logits(model, "llama")
    scaler.scale(model(**models.batch("llama", 9)).loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(models.logits(model, "llama"), before)
    assert handle.stats[-1].shares == {"none": 1.0}


def test_clipping_and_a_common_gradient_scale_do_not_matter():
    results = []
    for scale in (1.0, 1e-3):
        model, optimizer, handle = attached(optimizer_cls=torch.optim.SGD, lr=0.0, opt={"momentum": 0.9})
        (model(**models.batch("llama")).loss * scale).backward()
        optimizer.step()
        results.append(torch.cat([torch.cat(pair) for pair in handle.factors.values()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("accumulate", STORES)
def test_autocast_checkpointing_schedule_and_groups_work_together(accumulate):
    kind = "llama"
    model = models.lora(kind)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    a, b = ([p for n, p in model.named_parameters() if key in n] for key in ("lora_A", "lora_B"))
    optimizer = torch.optim.AdamW([{"params": a, "lr": 1e-3}, {"params": b, "lr": 4e-3}], weight_decay=0.1)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=2, accumulate=accumulate))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    changes, losses = watch(handle, model, kind), []
    for _step in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**models.batch(kind)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(models.trainable(model), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert max(change for change, recompressed in changes if not recompressed) < 1e-5


def test_detach_stops_and_keeps_the_function():
    model, optimizer, handle = attached()
    models.train(model, optimizer, "llama", 3)
    before = models.logits(model, "llama")
    handle.detach()
    assert torch.equal(models.logits(model, "llama"), before)
    models.train(model, optimizer, "llama", 3)
    assert len(handle.stats) == 3
    scalora.attach(model, optimizer)  # and it may be attached again


@pytest.mark.parametrize("accumulate", STORES)
def test_state_dict_continues_bitwise(accumulate, tmp_path):
    whole, optimizer, _ = attached(accumulate=accumulate)
    models.train(whole, optimizer, "llama", 11)

    first, optimizer, handle = attached(accumulate=accumulate)
    models.train(first, optimizer, "llama", 6)
    torch.save((first.state_dict(), optimizer.state_dict(), handle.state_dict()), tmp_path / "state.pt")
    second, optimizer, handle = attached(accumulate=accumulate)
    model_state, optimizer_state, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    handle.load_state_dict(state)
    models.train(second, optimizer, "llama", 5, start=6)
    assert torch.equal(models.logits(second, "llama"), models.logits(whole, "llama"))
    assert len(handle.stats) == 11


def test_the_rank_of_the_update_grows_past_r():
    model, optimizer, handle = attached(lr=1e-2)
    models.train(model, optimizer, "llama", 8)
    layer = handle.layers[0]
    update = accumulated(layer) + layer.scale * layer.A.double() @ layer.Bt.double()
    assert torch.linalg.matrix_rank(update, rtol=1e-5) > 2 * layer.rank


@pytest.mark.parametrize("lipschitz", [1.0, 100.0])
def test_a_given_lipschitz_constant_sets_c(lipschitz):
    model, optimizer, handle = attached(lipschitz=lipschitz, scaling="normalize", lr=0.01)
    models.train(model, optimizer, "llama", 1)
    model(**models.batch("llama")).loss.backward()
    handle.rescale()
    c = 1 / (lipschitz * 0.01)
    for layer in handle.layers:
        norms = layer.A.detach().norm(dim=0)
        torch.testing.assert_close(norms, torch.full_like(norms, (c / layer.scale**2) ** 0.5))
