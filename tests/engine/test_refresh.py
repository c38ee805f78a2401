"""A refresh changes the adapters to the gradient's best directions, never the function."""

import pytest
import torch

import scalora
from helpers import models
from helpers.attached import accumulated
from scalora import ScaLoraConfig, ScaloraError
from scalora.algebra.whitening import DAMPING, EXPONENT
from scalora.engine.refresh.refresh import WARMUP
from scalora.engine.refresh.sketch import Sketch

KINDS, STORES, COORDINATES = ("llama", "bert", "gpt2"), ("adapter", "base"), ("plain", "white")


def attached(kind="llama", every=4, lr=3e-3, optimizer_cls=torch.optim.AdamW, lora=None, **config):
    model = models.lora(kind, **{"r": 2, **(lora or {})})
    optimizer = optimizer_cls(models.trainable(model), lr=lr)
    return model, optimizer, scalora.attach(model, optimizer, ScaLoraConfig(interval=None, refresh=every, **config))


def watched(handle, act):
    """Call `act` before and after every refresh."""
    inner, seen = handle.refresh.refresh, []

    def refresh(*sketches):
        before = act()
        inner(*sketches)
        seen.append((before, act()))

    handle.refresh.refresh = refresh
    return seen


def dense_gradients(model, layers, batches, kind, backward):
    """G of each layer's frozen weight, summed over batches, from autograd itself."""
    for layer in layers:
        layer.base.weight.requires_grad_(True)
    for seed in batches:
        backward(model(**models.batch(kind, seed)).loss)
    found = []
    for layer in layers:
        G = layer.base.weight.grad
        found.append((G.mT if layer.base_weight.shape != layer.base.weight.shape or kind == "gpt2" else G).clone())
        layer.base.weight.grad = None
        layer.base.weight.requires_grad_(False)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.3}], ids=["fused", "PEFT's own forward"])
def test_probes_gather_the_products_with_the_full_gradient(kind, lora):
    model, optimizer, handle = attached(kind, lora=lora)
    handle.detach()
    for layer in handle.layers:  # dropout would make every pass another function
        torch.nn.init.zeros_(layer.A)
    G = dense_gradients(model, handle.layers, (0, 1, 2), kind, lambda loss: loss.backward())
    optimizer.zero_grad()
    sketch = Sketch(handle.layers)
    before = models.logits(model, kind)
    for side, at in (("left", 1), ("right", 0)):
        fixed = [torch.randn(g.shape[at], 5) for g in G]
        sketch.open(side, fixed)
        assert torch.equal(models.logits(model, kind), before)
        for seed in (0, 1, 2):
            model(**models.batch(kind, seed)).loss.backward()
        for g, basis, total in zip(G, fixed, sketch.close(), strict=True):
            torch.testing.assert_close(total, (g if side == "left" else g.mT) @ basis, rtol=1e-3, atol=1e-6)
        optimizer.zero_grad()
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    assert not [name for name in names if "probe" in name]


@pytest.mark.parametrize("way", ["autocast", "checkpointing", "compile"])
def test_probes_in_other_company(way):
    model, _, handle = attached()
    handle.detach()
    G = dense_gradients(model, handle.layers, (0,), "llama", lambda loss: loss.backward())
    sketch = Sketch(handle.layers)
    run = torch.compile(model, backend="eager") if way == "compile" else model
    if way == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    run(**models.batch("llama")).loss.backward()  # compiled without probes
    fixed = [torch.randn(g.shape[1], 5) for g in G]
    sketch.open("left", fixed)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss = run(**models.batch("llama")).loss
    loss.backward()
    for g, Omega, total in zip(G, fixed, sketch.close(), strict=True):
        wanted = g @ Omega
        assert (total - wanted).norm() < (0.1 if way == "autocast" else 1e-4) * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", STORES)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_a_refresh_leaves_the_function_unchanged(kind, accumulate, coordinates):
    model, optimizer, handle = attached(kind, accumulate=accumulate, coordinates=coordinates)
    changes = watched(handle, lambda: models.logits(model, kind))
    models.train(model, optimizer, kind, 9)
    assert handle.refresh.steps == [4, 8]
    assert max((after - before).abs().max().item() for before, after in changes) < 1e-5
    rank = torch.linalg.matrix_rank(handle.layers[0].A @ handle.layers[0].Bt)
    assert rank == 2


def test_many_refreshes_do_not_drift():
    """With room for every direction nothing is lost, only rounded."""
    model, optimizer, handle = attached(capacity=32, every=2, lr=1e-3)
    changes = watched(handle, lambda: models.logits(model, "llama"))
    models.train(model, optimizer, "llama", 101)
    assert len(changes) == 50
    assert sum((after - before).abs().max().item() for before, after in changes) < 1e-3


def test_a_recompression_sees_the_whole_update_and_nothing_else():
    model, optimizer, handle = attached(every=2, lr=1e-3)
    layer, make_room, seen = handle.layers[0], handle.store.recompress, []

    def held(layer):
        return layer.scale * layer.A.detach() @ layer.Bt.detach()

    def watched_room():
        seen.append((handle.step, accumulated(layer)))
        make_room()

    handle.store.recompress = watched_room
    changes = watched(handle, lambda: accumulated(layer) + held(layer).double())
    models.train(model, optimizer, "llama", 41)
    whole = dict(zip(handle.refresh.steps, (before for before, _ in changes), strict=True))
    assert len(seen) > 3
    for step, update in seen:
        torch.testing.assert_close(update, whole[step], rtol=1e-4, atol=1e-6)


def test_the_new_adapters_are_those_of_theorem_1(monkeypatch):
    """On one batch again and again, without moving, wide sketches hold the gradient: all can be computed from it."""
    monkeypatch.setattr(
        "scalora.engine.refresh.refresh.Refresh._random",
        lambda self, step, i: torch.randn(self.layers[i].Bt.shape[1], 32),
    )
    model, optimizer, handle = attached(lr=0.0, lora={"target_modules": ["q_proj"], "r": 2})
    sizes = handle.refresh.constants.clone()
    clipped, found = 0.0, []
    for _ in range(5):
        G = dense_gradients(model, handle.layers, (0,), "llama", lambda loss: loss.backward())
        optimizer.zero_grad()
        model(**models.batch("llama", 0)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(models.trainable(model), 1e-3)
        clipped = min(float(norm), 1e-3)
        optimizer.step()
        found = [(layer.A.grad.clone(), layer.Bt.grad.mT.clone()) for layer in handle.layers]
        optimizer.zero_grad()
    assert handle.refresh.steps == [4]
    norm = torch.stack([g.square().sum() for pair in found for g in pair]).sum().sqrt()
    assert norm == pytest.approx(clipped, rel=1e-2)  # as the loop had clipped it
    for layer, g, c, (grad_A, grad_B) in zip(handle.layers, G, sizes, found, strict=True):
        U, _, Vt = torch.linalg.svd(g)
        for columns, basis in ((layer.A, U[:, [0, 2]]), (layer.Bt.mT, Vt[[1, 3]].mT)):
            torch.testing.assert_close(columns.square().sum(0), c.float().expand(2), rtol=1e-4, atol=0)
            overlap = torch.linalg.svdvals(basis.mT @ columns / c.sqrt())
            assert overlap.min() > 0.999
        for gradient, exact in ((grad_A, layer.scale * g @ layer.Bt.mT), (grad_B, layer.scale * g.mT @ layer.A)):
            cosine = torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)
            assert cosine > 0.999


@pytest.mark.parametrize("every", [5, 12])
def test_the_optimizers_state_starts_anew_and_the_first_steps_are_short(every):
    model, optimizer, handle = attached(every=every)
    short = every // 6
    assert handle.refresh.warmup == min(short, WARMUP)
    models.train(model, optimizer, "llama", every)
    layer = handle.layers[0]
    for count in range(1, short + 2):
        model(**models.batch("llama", 7)).loss.backward()
        seen = {}
        hook = optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.update(A=layer.A.clone()))  # after ours
        optimizer.step()
        hook.remove()
        state, share = optimizer.state[layer.A], min(1.0, count / (short + 1))
        assert state["step"] == count
        m, v = state["exp_avg"] / (1 - 0.9**count), state["exp_avg_sq"] / (1 - 0.999**count)
        full = 3e-3 * (m / (v.sqrt() + 1e-8) + 1e-2 * seen["A"])  # AdamW's decay is shortened too
        torch.testing.assert_close(seen["A"] - layer.A, share * full, rtol=1e-3, atol=1e-7)
        optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", STORES)
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("stop", range(3, 10))
def test_a_run_resumes_bitwise_at_any_step(accumulate, coordinates, stop):
    def run():
        return attached(accumulate=accumulate, every=4, coordinates=coordinates)

    whole, optimizer, _ = run()
    models.train(whole, optimizer, "llama", 14)
    first, optimizer, handle = run()
    models.train(first, optimizer, "llama", stop)
    saved = first.state_dict(), optimizer.state_dict(), handle.state_dict()
    second, optimizer, handle = run()
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    handle.load_state_dict(saved[2])
    models.train(second, optimizer, "llama", 14 - stop, start=stop)
    for (name, one), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_columns_are_rescaled_between_refreshes_where_wanted():
    model = models.lora("llama", r=2)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=2, refresh=6))
    models.train(model, optimizer, "llama", 13)
    assert handle.refresh.steps == [6, 12]
    assert [event.step for event in handle.stats] == [0, 2, 4, 8, 10]


def test_a_layer_that_took_no_part_keeps_its_adapters():
    model, optimizer, handle = attached()
    idle = handle.layers[0]
    before = idle.A.detach().clone(), idle.Bt.detach().clone()
    inner = handle.refresh.refresh

    def refresh(left, right):
        right[0].zero_()
        inner(left, right)

    handle.refresh.refresh = refresh
    idle.module.lora_A[idle.adapter].requires_grad_(False)
    idle.module.lora_B[idle.adapter].requires_grad_(False)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    models.train(model, optimizer, "llama", 6)
    assert handle.refresh.steps == [4]
    torch.testing.assert_close((idle.A.detach(), idle.Bt.detach()), before)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("step", [1, 3], ids=["first sketch", "second sketch"])
def test_after_an_overflow_the_adapters_stay(step, coordinates):
    """As a grad scaler leaves it: gradients that are not finite, and a step that is not taken."""
    model, optimizer, handle = attached(coordinates=coordinates)
    for i in range(5):
        (model(**models.batch("llama", i)).loss * (torch.inf if i == step else 1.0)).backward()
        if i == step:
            for p in models.trainable(model):
                p.grad.zero_()
        before = handle.layers[0].A.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.refresh.steps == [4]
    longest = 4e-3 * (1 if coordinates == "plain" else DAMPING ** (-2 * EXPONENT))  # one optimizer step and no more
    assert (handle.layers[0].A - before).abs().max() < longest
    assert models.logits(model, "llama").isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"refresh": 1}, "refresh is 1: it must be a whole number of at least 2 or 'auto'"),
        ({"interval": None}, "interval and refresh are both None and coordinates is 'plain'"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ScaloraError, match=message):
        ScaLoraConfig(**config)


def test_a_layer_without_2r_directions_is_refused():
    with pytest.raises(ScaloraError, match=r"refresh=4 needs two times rank 17 .* 32×32: choose 16 or less"):
        attached(lora={"r": 17})


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_a_grad_scaler_and_clipping_change_nothing(coordinates):
    """The sketches see scaled gradients, the optimizer unscaled and clipped ones."""
    runs = []
    for scale in (1.0, 1024.0):
        model, optimizer, _ = attached(every=4, optimizer_cls=torch.optim.SGD, lr=0.1, coordinates=coordinates)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for step in range(9):
            scaler.scale(model(**models.batch("llama", step)).loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(models.trainable(model), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append(models.logits(model, "llama"))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-5)
    assert (runs[0] - models.logits(models.lora("llama", r=2), "llama")).abs().max() > 1e-3
