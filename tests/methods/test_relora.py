"""ReLoRA: a restart keeps the function, renews the adapters and nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import TrainerCallback

from helpers import models, training
from scalora import ScaloraError
from scalora.engine.plain_lora import joined_factors
from scalora.layers.peft_lora import find_layers
from scalora.methods.relora import prune_state, rewarmup


class _Watch(TrainerCallback):
    """Placed before and after ReLoRA's own callback: what a restart changes."""

    def __init__(self, model):
        self.model, self.updates, self.factors, self.rates = model, [], [], []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        step = optimizer.optimizer.step
        self.optimizer = optimizer.optimizer
        self.optimizer.register_step_pre_hook(lambda *_: self.rates.append(self.optimizer.param_groups[0]["lr"]))
        assert step

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.updates.append([P @ Q.T for P, Q in map(joined_factors, find_layers(self.model))])
            self.factors.append([(layer.A.clone(), layer.Bt.clone()) for layer in find_layers(self.model)])


def _run(tmp_path, kind="llama", steps=8, **options):
    fields = {k: options.pop(k) for k in ("lr_scheduler_type", "warmup_steps", "learning_rate") if k in options}
    adapted = training.adapt("relora", kind, tmp_path / "base", options=options)
    before, after = _Watch(adapted.model), _Watch(adapted.model)
    made = training.trainer(adapted, kind, tmp_path / "out", max_steps=steps, **{"learning_rate": 5e-3, **fields})
    made.callback_handler.callbacks.insert(0, before)
    made.callback_handler.callbacks.append(after)
    made.train()
    return adapted, made, before, after


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_restart_keeps_the_function_and_begins_anew(kind, tmp_path):
    adapted, _, before, after = _run(tmp_path, kind, every=3)
    for step in range(1, 9):
        for old, new in zip(before.updates[step - 1], after.updates[step - 1], strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
        for (A, Bt), (old_A, old_Bt) in zip(after.factors[step - 1], before.factors[step - 1], strict=True):
            if step in (3, 6):
                assert not A.any()
                bound = 1 / math.sqrt(Bt.shape[1])  # Kaiming-uniform with a = √5
                assert Bt.abs().max() <= bound
                assert Bt.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)
                assert not torch.equal(Bt, old_Bt)
            else:
                assert torch.equal(A, old_A)
                assert A.any(), "learning goes on in every cycle, the first included"
    assert all(len(spectrum.sigma) > 4 and spectrum.sigma[8] > 1e-6 for _, spectrum in adapted.spectra())


def test_by_default_there_are_four_cycles_and_none_begins_at_the_end(tmp_path):
    _, _, _, after = _run(tmp_path, steps=8)
    assert [not factors[0][0].any() for factors in after.factors] == [step in (2, 4, 6) for step in range(1, 9)]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_saved_adapter_merges_into_the_untouched_base(kind, tmp_path):
    base = training.base(kind, tmp_path / "base")
    adapted, _, _, _ = _run(tmp_path, kind, every=2)
    frozen = {n.replace(".base_layer", ""): p for n, p in adapted.model.get_base_model().named_parameters()}
    for name, param in base.named_parameters():
        if name in frozen:
            assert torch.equal(param, frozen[name]), name
    adapted.save(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    torch.testing.assert_close(models.logits(merged, kind), models.logits(adapted.model, kind), rtol=0, atol=1e-5)


def test_many_restarts_with_enough_capacity_lose_nothing(tmp_path):
    adapted, _, before, after = _run(tmp_path, steps=10, every=1, capacity=48, warmup=0)
    for old, new in zip(before.updates, after.updates, strict=True):
        for a, b in zip(old, new, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
    assert float(adapted.callbacks[0].store.discarded.max()) < 1e-9


@given(every=st.integers(2, 50), warmup=st.integers(0, 49), step=st.integers(0, 400))
def test_the_learning_rate_comes_back_linearly(every, warmup, step):
    warmup = min(warmup, every - 1)
    factor = rewarmup(step, every, warmup)
    if step < every or step % every >= warmup:
        assert factor == 1
    else:
        assert factor == (step % every) / warmup


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_optimizer_sees_the_lowered_rate_under_any_schedule(schedule, tmp_path):
    _, made, before, _ = _run(tmp_path, steps=9, every=4, warmup=2, lr_scheduler_type=schedule)
    lowered = before.rates  # read by a hook that runs before ReLoRA's
    logged = [entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry]
    assert logged == lowered  # the schedule itself, untouched: each step's rate was restored


def test_the_rate_in_the_step_itself(tmp_path):
    adapted = training.adapt("relora", "llama", tmp_path / "base", options={"every": 4, "warmup": 2})
    made = training.trainer(adapted, "llama", tmp_path / "out", max_steps=9)
    seen = []

    class Late(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            inner = optimizer.optimizer
            inner.register_step_pre_hook(lambda *_: seen.append(inner.param_groups[0]["lr"]))

    made.add_callback(Late())
    made.train()
    assert seen == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 0, 5e-4, 1e-3, 1e-3, 0])


@given(share=st.floats(0.05, 0.95), pruning=st.sampled_from(["random", "magnitude"]), seed=st.integers(0, 20))
def test_pruning_keeps_the_asked_share_and_the_step_counter(share, pruning, seed):
    torch.manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(40, 50))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    old = {k: v.clone() for k, v in optimizer.state[param].items()}
    prune_state(optimizer, param, pruning, share, torch.Generator().manual_seed(seed))
    new = optimizer.state[param]
    assert new["step"] == old["step"]
    for key in ("exp_avg", "exp_avg_sq"):
        kept = new[key] != 0
        assert torch.equal(new[key][kept], old[key][kept])
        assert float(kept.float().mean()) == pytest.approx(1 - share, abs=0.05 if pruning == "random" else 1e-3)
        if pruning == "magnitude":
            assert old[key][kept].abs().min() >= old[key][~kept].abs().max()


def test_a_restart_prunes_the_adapters_moments_but_not_the_heads(tmp_path):
    adapted = training.adapt("relora", "bert", tmp_path / "base", options={"every": 3})
    made = training.trainer(adapted, "bert", tmp_path / "out", max_steps=4)
    shares = {}

    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 3:
                for name, param in model.named_parameters():
                    if param.requires_grad:
                        shares[name] = (optimizer.optimizer.state[param]["exp_avg"] != 0).float().mean().item()

    made.add_callback(Late())
    made.train()
    assert all(share < 0.05 for name, share in shares.items() if "lora_" in name)
    assert any(share > 0.9 for name, share in shares.items() if "classifier" in name)


def test_the_runs_randomness_does_not_depend_on_restarts(tmp_path):
    drawn = []
    for every in (1, 6):
        adapted = training.adapt("relora", "llama", tmp_path / "base", options={"every": every}, dropout=0.2)
        training.trainer(adapted, "llama", tmp_path / "out").train()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_warmup_longer_than_the_cycle_is_refused(tmp_path):
    with pytest.raises(ScaloraError, match=r"warmup is 5.*every 3 steps"):
        _run(tmp_path, every=3, warmup=5)


def test_two_moments_in_one_entry_are_both_pruned():
    """As AdEMAMix keeps them: beside a second moment of zeros, means that stay would be steps of any size."""
    param = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = torch.optim.SGD([param])
    optimizer.state[param] = {"state1": torch.ones(2, 3, 5), "state2": torch.ones(3, 5), "step": torch.ones(())}
    prune_state(optimizer, param, "random", 1.0)
    assert [bool(value.any()) for value in optimizer.state[param].values()] == [False, False, True]


def test_an_optimizer_that_evaluates_averages_is_refused(tmp_path):
    adapted = training.adapt("relora", "llama", tmp_path / "base", options={"every": 3})
    made = training.trainer(adapted, "llama", tmp_path / "out", optim="schedule_free_adamw")
    with pytest.raises(ScaloraError, match=r"schedule_free_adamw.*average of points"):
        made.train()
