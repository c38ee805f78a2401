"""Steps in white coordinates: against dense algebra, and with all that ScaLoRA does."""

import pytest
import torch
from peft import PeftModel

import scalora
from helpers import models
from helpers.operations import Operations
from scalora import ScaLoraConfig, ScaloraError
from scalora.algebra.scaling import optimal_scaling
from scalora.algebra.whitening import DAMPING
from scalora.engine.white.moments import EVERY, FIRST

EVENTS = {"no events": {"interval": None}, "rescaled": {"interval": 2}, "refreshed": {"interval": None, "refresh": 4}}


def attached(
    kind="llama", optimizer_cls=torch.optim.AdamW, lr=1e-3, config=None, dtype=torch.float32, layers=2, **lora
):
    model = models.lora(kind, dtype, layers, **{"r": 2, **lora})
    optimizer = optimizer_cls(models.trainable(model), lr=lr)
    config = ScaLoraConfig(coordinates="white", **(config or EVENTS["no events"]))
    return model, optimizer, scalora.attach(model, optimizer, config)


def recorded(handle):
    """g and x of each layer, (T, m) and (T, n), by pass."""
    seen = {layer.name: [] for layer in handle.layers}

    def listen(name, x, result):
        result.register_hook(lambda g: seen[name].append((g.flatten(0, -2), x.detach().flatten(0, -2))))

    for layer in handle.layers:
        layer.module.register_forward_hook(lambda _, args, out, name=layer.name: listen(name, args[0], out))
    return seen


def dense(side, power):
    """(C/λ + δI) to a power, from what is known of C; float64."""
    U, e, tail = (part.double() for part in side.tensors)
    C = (U * e) @ U.mT + tail * (torch.eye(len(U), dtype=U.dtype) - U @ U.mT)
    values, V = torch.linalg.eigh(C + DAMPING * torch.eye(len(C), dtype=C.dtype))
    return (V * values.pow(power)) @ V.mT


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.3}], ids=["fused", "PEFT's own forward"])
def test_coordinates_are_those_of_the_inputs_and_gradients_of_one_pass(kind, lora):
    model, optimizer, handle = attached(kind, **lora)
    seen = recorded(handle)
    for part in (0, 1):  # micro-batches
        model(**models.batch(kind, part)).loss.backward()
    optimizer.step()
    for i, layer in enumerate(handle.layers):
        g, x = (torch.cat(parts).double() for parts in zip(*seen[layer.name], strict=True))
        sides = (g * x.norm(dim=-1, keepdim=True), x * g.norm(dim=-1, keepdim=True))
        for side, vectors in zip(handle.white.moments.of(i), sides, strict=True):
            C = vectors.mT @ vectors
            C /= C.diagonal().mean()
            direction = side.U[:, 0].double()  # some eigenvector, wide layers having more than are followed
            torch.testing.assert_close(side.e[0].double(), direction @ C @ direction, rtol=0.1, atol=1e-3)
            if side.U.shape[0] == side.U.shape[1]:
                torch.testing.assert_close(((side.U * side.e) @ side.U.mT).double(), C, rtol=1e-3, atol=1e-3)


def test_what_gets_no_gradient_does_not_count():
    """Padding on the right changes nothing."""
    found = []
    for padding in (0, 5):
        model, optimizer, handle = attached()
        ids = torch.nn.functional.pad(models.batch("llama")["input_ids"], (0, padding), value=1)
        for _ in range(2):
            mask = torch.arange(ids.shape[1]).expand_as(ids) < ids.shape[1] - padding
            labels = ids.masked_fill(~mask, -100)
            model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        sides = [side for white in handle.white.moments.white for side in white]
        found.append([torch.cat([side.e.flatten(), side.tail]) for side in sides])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_looking_costs_a_few_steps_at_first_and_then_one_of_ten():
    model, optimizer, handle = attached()
    looking = []
    assert handle.white.moments.looking  # at the first pass
    for step in range(2 * EVERY + 1):
        models.train(model, optimizer, "llama", 1, start=step)
        looking.append(handle.white.moments.looking)
    assert [step for step, on in enumerate(looking) if on] == [*range(FIRST - 1), EVERY, 2 * EVERY]
    handle.detach()
    assert all(layer.module.moments is None for layer in handle.layers)


@pytest.mark.parametrize(("kind", "exponent"), [("llama", 0.25), ("gpt2", 0.25), ("llama", 0.375)])
def test_a_step_of_sgd_is_a_step_along_the_twice_whitened_gradient(kind, exponent):
    config = {"interval": None, "exponent": exponent}
    model, optimizer, handle = attached(kind, torch.optim.SGD, lr=0.5, config=config)
    models.train(model, optimizer, kind, 5)
    model(**models.batch(kind, 5)).loss.backward()
    before = [[p.detach().double() for p in (layer.A, layer.Bt)] for layer in handle.layers]
    gradients = [[p.grad.double() for p in (layer.A, layer.Bt)] for layer in handle.layers]
    optimizer.step()
    for i, layer in enumerate(handle.layers):
        outputs, inputs = (dense(side, -2 * exponent) for side in handle.white.moments.of(i))
        (A, Bt), (g_A, g_Bt) = before[i], gradients[i]
        torch.testing.assert_close(layer.A.detach().double(), A - 0.5 * outputs @ g_A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.Bt.detach().double(), Bt - 0.5 * g_Bt @ inputs, rtol=1e-4, atol=1e-6)


def test_adam_sees_whitened_gradients_and_its_step_is_taken_back():
    model, optimizer, handle = attached()
    models.train(model, optimizer, "llama", 3)
    twins = {}
    for layer in handle.layers:  # Adam by itself, given what it should be given, from where it stands
        for p in (layer.A, layer.Bt):
            twin = p.detach().double().requires_grad_(True)
            state = {k: v.clone().double() for k, v in optimizer.state[p].items()}
            twins[p] = twin, torch.optim.AdamW([twin], lr=1e-3)
            twins[p][1].state[twin] = state
    model(**models.batch("llama", 3)).loss.backward()
    gradients = {p: p.grad.double() for p in twins}
    before = {p: p.detach().double() for p in twins}
    optimizer.step()
    for i, layer in enumerate(handle.layers):
        outputs, inputs = (dense(side, -0.25) for side in handle.white.moments.of(i))
        for p, into in ((layer.A, lambda X: outputs @ X), (layer.Bt, lambda X: X @ inputs)):  # noqa: B023
            twin, adam = twins[p]
            twin.grad = into(gradients[p])
            adam.step()
            wanted = before[p] + into(twin.detach() - before[p])
            torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-3, atol=1e-6)


def test_what_is_drawn_at_random_is_drawn_in_white_coordinates():
    model, optimizer, handle = attached(init_lora_weights="gaussian")
    started = handle.layers[0]
    torch.nn.init.normal_(started.A)
    before = [(layer.A.detach().clone(), layer.Bt.detach().clone()) for layer in handle.layers]
    model(**models.batch("llama")).loss.backward()
    handle._before_step(optimizer, (optimizer,), {})
    for i, (layer, (A, Bt)) in enumerate(zip(handle.layers, before, strict=True)):
        assert torch.equal(layer.A, A)
        if layer is started:
            assert torch.equal(layer.Bt, Bt)
            assert layer.A.grad.any()
            continue
        M = dense(handle.white.moments.of(i).inputs, 0.25)
        torch.testing.assert_close(layer.Bt.detach().double() @ M, Bt.double(), rtol=1e-4, atol=1e-6)
        assert not layer.A.grad.any()  # it was that for another B


def test_means_of_gradients_turn_with_the_coordinates():
    model, optimizer, handle = attached()
    models.train(model, optimizer, "llama", 2)
    moments, layer = handle.white.moments, handle.layers[0]
    assert moments.looking
    old = [dense(side, 0.25) for side in moments.of(0)]
    means = [optimizer.state[p]["exp_avg"].double() for p in (layer.A, layer.Bt)]
    model(**models.batch("llama", 2)).loss.backward()
    g_A, g_Bt = layer.A.grad.double(), layer.Bt.grad.double()
    optimizer.step()
    Ni, Mi = (dense(side, -0.25) for side in moments.of(0))
    wanted = 0.9 * Ni @ old[0] @ means[0] + 0.1 * Ni @ g_A, 0.9 * means[1] @ old[1] @ Mi + 0.1 * g_Bt @ Mi
    for p, mean in zip((layer.A, layer.Bt), wanted, strict=True):
        assert (optimizer.state[p]["exp_avg"] - mean).norm() < 1e-3 * mean.norm()


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_a_rescaling_leaves_the_function_unchanged_and_reads_white_products(kind, accumulate):
    model, optimizer, handle = attached(kind, config={"interval": 100, "accumulate": accumulate}, lr=3e-3)
    models.train(model, optimizer, kind, 5)
    before = models.logits(model, kind)
    layers, moments = handle.layers, handle.white.moments
    A, Bt = ([p.detach().double() for p in parts] for parts in ([x.A for x in layers], [x.Bt for x in layers]))
    model(**models.batch(kind, 5)).loss.backward()
    g_A, g_Bt = ([p.grad.double() for p in parts] for parts in ([x.A for x in layers], [x.Bt for x in layers]))
    handle.white.before_step(5)
    handle.rescale()
    assert (models.logits(model, kind) - before).abs().max() < 1e-5
    alpha, beta = handle.factors[layers[0].name]
    (N, M), (Ni, Mi) = ([dense(side, power) for side in moments.of(0)] for power in (0.25, -0.25))
    white = optimal_scaling(N @ A[0], M @ Bt[0].mT, Ni @ g_A[0], Mi @ g_Bt[0].mT, c=handle.constants[0])
    torch.testing.assert_close((alpha, beta), (white.alpha, white.beta), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("stop", [1, 3, 7, 11])
def test_a_run_resumes_bitwise(events, stop):
    whole, optimizer, _ = attached(config=EVENTS[events])
    models.train(whole, optimizer, "llama", 14)
    first, optimizer, handle = attached(config=EVENTS[events])
    models.train(first, optimizer, "llama", stop)
    saved = first.state_dict(), optimizer.state_dict(), handle.state_dict()
    second, optimizer, handle = attached(config=EVENTS[events])
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    handle.load_state_dict(saved[2])
    models.train(second, optimizer, "llama", 14 - stop, start=stop)
    for (name, one), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_step_has_no_operation_of_its_own_for_any_layer():
    """What white coordinates add to LoRA's step grows with the number of shapes only."""
    found = []
    for layers in (1, 4):
        model, optimizer, handle = attached(lr=1e-3, layers=layers)
        optimizer.defaults["foreach"] = optimizer.param_groups[0]["foreach"] = True
        models.train(model, optimizer, "llama", 4)
        assert not handle.white.moments.looking
        model(**models.batch("llama", 4)).loss.backward()
        with Operations() as step:
            optimizer.step()
        optimizer.zero_grad()
        with Operations() as opened:
            handle.white.moments.open()
        model(**models.batch("llama", 5)).loss.backward()
        with Operations() as closed:
            handle.white.moments.close()
        handle.detach()
        model(**models.batch("llama", 6)).loss.backward()
        with Operations() as plain:
            optimizer.step()
        shapes = len(handle.white.moments.groups)
        assert step.launches - plain.launches <= 40 * shapes
        assert opened.launches <= 3 * shapes
        assert closed.launches <= 130 * shapes
        sizes = {side.U.shape[-1] for white in handle.white.moments.white for side in white}
        assert closed.launched["_linalg_eigh"] == 2 * len(sizes)  # each waits for the device
        assert "linalg_qr" not in closed.names
        found.append([step.launches, opened.launches, closed.launches])
    assert found[0] == found[1]


def test_without_events_it_is_a_plain_lora_of_its_rank(tmp_path):
    base = {name: p.clone() for name, p in models.base("llama").named_parameters()}
    model, optimizer, handle = attached(lr=3e-3)
    models.train(model, optimizer, "llama", 12)
    assert all(layer.accumulated.room == 0 for layer in handle.layers)
    for name, p in model.get_base_model().named_parameters():
        plain = name.replace(".base_layer", "")
        assert "lora" in name or "accumulated" in name or torch.equal(p, base[plain])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(models.base("llama"), tmp_path)
    assert again.peft_config["default"].r == 2
    torch.testing.assert_close(models.logits(again, "llama"), models.logits(model, "llama"), rtol=0, atol=1e-5)


def test_half_precision_adapters_and_layers_without_gradient():
    model, optimizer, handle = attached(dtype=torch.bfloat16)
    idle = handle.layers[0]
    before = idle.A.detach().clone(), idle.Bt.detach().clone()
    for matrix in (idle.module.lora_A, idle.module.lora_B):
        matrix[idle.adapter].requires_grad_(False)
    models.train(model, optimizer, "llama", 5)
    torch.testing.assert_close((idle.A.detach(), idle.Bt.detach()), before)
    assert models.logits(model, "llama").isfinite().all()


def test_a_step_that_is_not_taken_changes_nothing():
    """A grad scaler skips the step after an overflow, and what was seen in that pass is left out."""
    model, optimizer, _ = attached()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(3):
        before = [p.detach().clone() for p in models.trainable(model)]
        scaler.scale(model(**models.batch("llama", step)).loss * (torch.inf if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 1:
            torch.testing.assert_close([p.detach() for p in models.trainable(model)], before, rtol=0, atol=0)
    assert models.logits(model, "llama").isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"coordinates": "black"}, "coordinates is 'black': choose one of plain, white"),
        ({"accumulate": "base"}, "accumulate is 'base', but interval and refresh are both None"),
        ({"capacity": 3}, "capacity is 3, but interval and refresh are both None"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ScaloraError, match=message):
        ScaLoraConfig(**{"interval": None, "coordinates": "white", **config})
