"""The sum that a layer keeps while it trains: of what it is, when it is formed anew, and that nobody else sees it."""

import copy
import pickle
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scalora
from helpers import models
from scalora.layers import kept_sum
from scalora.layers.accumulated import ADDITIONS, Accumulated
from scalora.layers.kept_sum import KeptSum
from scalora.layers.lora_forward import LoraForward
from scalora.layers.products import Adapter
from scalora.layers.sharding import copy_into


@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3), turned=st.booleans())
def test_it_is_the_definition_until_something_changes(ranks, turned):
    m, n = 7, 5
    W, x = torch.randn(n, m).double().mT if turned else torch.randn(m, n).double(), torch.randn(2, 3, n).double()
    frozen = [Adapter(torch.randn(r, n).double(), torch.randn(m, r).double(), 0.5 + i) for i, r in enumerate(ranks)]
    kept = KeptSum()

    def is_right():
        found = kept.of(W, frozen, x)
        torch.testing.assert_close(found, W + sum(each.scale * each.lora_B @ each.lora_A for each in frozen))
        return found

    with patch.object(kept_sum, "_next", side_effect=kept_sum._next) as made:
        assert is_right() is is_right()
        for tensor in (W, *frozen[-1][:2]):
            tensor[0, 0] += 1.0
            is_right()
        frozen[0] = frozen[0]._replace(scale=3.0)
        is_right()
        frozen[0] = frozen[0]._replace(lora_A=torch.randn(ranks[0], n).double())
        is_right()
    assert made.call_count == 6


@given(
    widths=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    written=st.lists(st.integers(0, 9), max_size=3),
    dropped=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_columns_appended_are_added_to_it_as_they_would_be_if_it_were_formed_anew(widths, written, dropped, dtype):
    m, n = 7, 5
    W, x = torch.randn(m, n, dtype=dtype), torch.randn(2, n, dtype=dtype)
    held = Accumulated(m, n, 2 + sum(widths), x)
    held.put(torch.randn(m, 2), torch.randn(2, n))
    kept, other = KeptSum(), Adapter(torch.randn(1, n, dtype=dtype), torch.randn(m, 1, dtype=dtype), 0.5)
    with patch.object(kept_sum, "formed", side_effect=kept_sum.formed) as formed:
        for i, k in enumerate([0, *widths]):
            if k:
                before, used = held.versions, held.used
                copy_into([held.P], [torch.randn(m, k, dtype=dtype)], [(0, used)])
                copy_into([held.Qt], [torch.randn(k, n, dtype=dtype)], [(used, 0)])
                held.grown(k, before)
                assert held.used == used + k
            if i in written:  # by somebody else, among the columns that were there
                held.P.detach()[0, 0] += 1.0
            if i in dropped:
                kept.drop()
            P, Qt = held.live()
            frozen = [other, Adapter(Qt, P, 3.0, held.growth)]
            formed.reset_mock()
            found = kept.of(W, frozen, x)
            assert formed.called == (not k or i in written or i in dropped or len(held.growth.columns) == 1)
            torch.testing.assert_close(found, W + 0.5 * other.lora_B @ other.lora_A + 3.0 * P @ Qt)
            assert torch.equal(found, KeptSum().of(W, frozen, x))


@pytest.mark.parametrize("recompressed", [False, True])
def test_a_store_that_is_loaded_goes_on_adding_as_the_saved_one_does(recompressed):
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    store = scalora.attach(model, optimizer, scalora.ScaLoraConfig(interval=1)).store
    models.train(model, optimizer, "llama", 14)
    if recompressed:  # as a refresh may leave it
        store.recompress()
    state, found = store.state_dict(), []
    for loaded in (False, True):
        held = store.layers[0].accumulated
        if loaded:
            held.used, held.growth = int(state["used"][store.layers[0].name]), None
            store.load_state_dict(state)
        held.grown(1, held.versions)
        found.append(held.growth.columns)
    assert found[0] == found[1]
    assert len(found[0]) > 1


def test_a_weight_written_to_unseen_is_computed_with_after_five_events_at_the_latest():
    W, x = torch.randn(7, 5).double(), torch.randn(2, 5).double()
    held, kept, events = Accumulated(7, 5, 40, x), KeptSum(), 0
    held.put(torch.randn(7, 2), torch.randn(2, 5))
    for turn in range(8):
        if turn == 1:
            W.data.mul_(2.0)
        before = held.versions
        copy_into(
            [held.P, held.Qt], [torch.ones(7, 1).double(), torch.ones(1, 5).double()], [(0, held.used), (held.used, 0)]
        )
        held.grown(1, before)
        P, Qt = held.live()
        found = kept.of(W, [Adapter(Qt, P, 1.0, held.growth)], x)
        events += turn > 0 and not torch.allclose(found, W + P @ Qt)
    assert 1 <= events < ADDITIONS + 1


def test_few_tokens_make_it_pay_where_columns_stay_for_long():
    W = torch.empty(384, 384)
    assert KeptSum(10).pays(torch.empty(1, 24, 384), W)
    assert KeptSum(1).pays(torch.empty(16, 24, 384), W)
    assert not KeptSum(1).pays(torch.empty(1, 24, 384), W)


def _attached(kind="llama", **settings):
    model = models.lora(kind)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    scalora.attach(model, optimizer, scalora.ScaLoraConfig(**settings))
    return model, optimizer


def _sums(model):
    return [module.kept_sum for module in model.modules() if isinstance(module, LoraForward)]


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_computes_what_it_computes_without(kind, autocast):
    model, optimizer = _attached(kind, interval=1)
    models.train(model, optimizer, kind, 3)
    outcomes = []
    for keeps in (True, False):
        for module in model.modules():
            if isinstance(module, LoraForward):
                module.kept_sum = KeptSum() if keeps else None
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**models.batch(kind))
        output.loss.backward()
        outcomes.append([output.logits.float(), *(p.grad for p in models.trainable(model))])
        assert not keeps or all(kept._made is not None for kept in _sums(model))
    for ours, theirs in zip(*outcomes, strict=True):
        assert (ours - theirs).norm() <= (0.05 if autocast else 1e-5) * theirs.norm() + 1e-9


@pytest.mark.parametrize("settings", [{"interval": 3}, {"interval": None, "refresh": 3}, {"interval": 2, "refresh": 3}])
def test_it_is_formed_once_for_the_steps_between_two_events(settings, monkeypatch):
    formed, wanted, before = [], 0, None
    monkeypatch.setattr(kept_sum, "_next", lambda *a: formed.append(1) or torch.zeros_like(a[2]))
    model, optimizer = _attached(**settings)
    held = [module.accumulated["default"] for module in model.modules() if isinstance(module, LoraForward)]
    for _ in range(9):
        now = [(h.used, *h.P.flatten().tolist()) for h in held]
        wanted += len(held) * (now != before and any(h.used for h in held))
        before = now
        models.train(model, optimizer, "llama", 1)
    assert len(formed) == wanted
    assert 2 * len(held) <= wanted <= 6 * len(held)


def test_passes_at_two_scales_share_a_backward_and_one_from_before_an_event_is_refused_by_autograd():
    gradients = []
    for keep_sums in (None, False):
        torch.manual_seed(0)
        model, optimizer = _attached(interval=2, keep_sums=keep_sums)
        models.train(model, optimizer, "llama", 3)
        modules = [module for module in model.modules() if isinstance(module, LoraForward)]
        loss = model(**models.batch("llama")).loss
        for module in modules:
            module.set_scale("default", 0.5)
        (loss + model(**models.batch("llama", 1)).loss).backward()
        gradients.append([p.grad for p in models.trainable(model)])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    model, optimizer = _attached(interval=1)
    models.train(model, optimizer, "llama", 3)
    late = model(**models.batch("llama")).loss
    models.train(model, optimizer, "llama", 1)
    model(**models.batch("llama"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def _is_base(name):
    return "lora_" not in name and "accumulated" not in name


def test_nobody_else_sees_it():
    model, optimizer = _attached(interval=1)
    keys, before = set(model.state_dict()), {name: p.clone() for name, p in model.named_parameters() if _is_base(name)}
    models.train(model, optimizer, "llama", 3)
    assert set(model.state_dict()) == keys
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(_sums(model)))):
        emptied = other if isinstance(other, list) else _sums(other)
        assert [kept._made for kept in emptied] == [None] * len(emptied)
    assert all(kept._made is not None for kept in _sums(model))
    model.eval()
    assert all(kept._made is None for kept in _sums(model))


def test_a_base_that_is_loaded_in_mid_run_is_computed_with():
    model, optimizer = _attached(interval=2)
    models.train(model, optimizer, "llama", 3)
    other = {name: torch.randn_like(t) if "base_layer" in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(other)
    found = model(**models.batch("llama")).logits
    wanted = model.eval()(**models.batch("llama")).logits  # forms its own
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "autocast", "at_most"),
    [(torch.bfloat16, False, 1.15), (torch.bfloat16, True, 1.15), (torch.float32, True, 1.35)],
)
def test_in_half_precision_it_is_about_as_near_to_the_truth_as_thin_products(base, autocast, at_most):
    model = models.lora("llama").to(base)
    for name, p in model.named_parameters():
        p.data = p.data.float() if "lora_" in name else p.data
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, scalora.ScaLoraConfig(interval=1, keep_sums=True))
    models.train(model, optimizer, "llama", 16)  # until as much has been added to one sum as ever is
    handle.detach()
    held = [h for module in model.modules() if isinstance(module, LoraForward) for h in module.accumulated.values()]
    assert {len(h.growth.columns) for h in held} == {1 + ADDITIONS}
    exact, errors = copy.deepcopy(model).double(), {True: 0.0, False: 0.0}
    for seed in range(10):
        truth = exact(**models.batch("llama", seed)).logits
        for keeps in errors:
            for module in model.modules():
                if isinstance(module, LoraForward):
                    module.kept_sum = KeptSum(half=True) if keeps else None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                errors[keeps] += float((model(**models.batch("llama", seed)).logits - truth).detach().norm())
            assert not keeps or all(kept._made[1].dtype == torch.bfloat16 for kept in _sums(model))
    assert errors[True] <= at_most * errors[False]


def test_a_base_in_half_precision_keeps_none_unless_told():
    for keep_sums in (None, True):
        model = models.lora("llama").bfloat16()
        for name, p in model.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
        optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
        scalora.attach(model, optimizer, scalora.ScaLoraConfig(interval=1, keep_sums=keep_sums))
        models.train(model, optimizer, "llama", 3)
        assert all((kept._made is not None) == bool(keep_sums) for kept in _sums(model))


def test_a_pass_without_gradients_computes_the_same_and_one_in_inference_mode_leaves_nothing():
    """The first pass of a reentrant checkpoint has no gradients, and is made again with them."""
    model, optimizer = _attached(interval=2)
    models.train(model, optimizer, "llama", 2)
    model.eval().train()  # empties them
    with torch.inference_mode():
        model(**models.batch("llama"))
    assert all(kept._made is None for kept in _sums(model))
    with torch.no_grad():
        first = model(**models.batch("llama")).logits
    again = model(**models.batch("llama"))
    assert torch.equal(first, again.logits)
    again.loss.backward()


def test_it_can_be_switched_off_and_only_by_true_or_false():
    model, optimizer = _attached(interval=1, keep_sums=False)
    models.train(model, optimizer, "llama", 2)
    assert set(_sums(model)) == {None}
    with pytest.raises(scalora.ScaloraError, match="keep_sums is 'no': it must be true, false or None"):
        scalora.ScaLoraConfig(keep_sums="no")
