"""LoftQ: the best start that its quantised base allows, whatever alpha is, and saved with that base."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scalora
from helpers import exports, models, training
from scalora import ScaloraError
from scalora.algebra.loftq import loftq_start
from scalora.algebra.nf4 import from_nf4, nf4_rounded
from scalora.common.quiet import quiet
from scalora.layers.peft_lora import find_layers
from scalora.methods.support.nf4_base import round_to_nf4
from scalora.runs.inputs import Inputs
from scalora.runs.loading import load_inputs
from scalora.runs.recipe import load_recipe

LOFTQ = ["method=loftq", "method.options={steps: 3}", "quantization=nf4-rounded"]


@given(m=st.integers(4, 40), n=st.integers(4, 40), rank=st.integers(1, 4), steps=st.integers(1, 5))
def test_the_adapter_is_the_best_approximation_of_what_quantising_lost(m, n, rank, steps):
    torch.manual_seed(m * n + steps)
    W = torch.randn(m, n)
    start = loftq_start(W, rank, steps)
    lost = (W - from_nf4(start.quantised, W)).double()
    tail = torch.linalg.svdvals(lost)[rank:].square().sum().sqrt()
    error = (lost - (start.P @ start.R.mT).double()).norm()
    assert float(error) == pytest.approx(float(tail), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(start.P.square().sum(0), start.R.square().sum(0), rtol=1e-3, atol=1e-5)


@given(m=st.integers(4, 40), n=st.integers(4, 40), steps=st.integers(1, 4))
def test_the_base_is_what_the_adapter_before_left_over(m, n, steps):
    torch.manual_seed(m * n)
    W, former = torch.randn(m, n), torch.zeros(m, n)
    for done in range(1, steps + 1):
        start = loftq_start(W, 2, done)
        torch.testing.assert_close(from_nf4(start.quantised, W), nf4_rounded(W - former))
        former = start.P @ start.R.mT


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_start_is_nearer_to_the_float_model_whatever_alpha_is(kind, tmp_path):
    base = training.base(kind, tmp_path / "base")
    exact = models.logits(base, kind)
    adapted = [training.adapt("loftq", kind, tmp_path / "base", alpha=alpha).model for alpha in (1.0, 8.0, 300.0)]
    starts = [models.logits(model, kind) for model in adapted]
    for start in starts[1:]:
        torch.testing.assert_close(start, starts[0], rtol=0, atol=1e-5)
    round_to_nf4(base, [layer.name.removeprefix("base_model.model.") for layer in find_layers(adapted[0])])
    assert (starts[0] - exact).norm() < (models.logits(base, kind) - exact).norm()


def test_alternating_comes_closer(tmp_path):
    W = torch.randn(96, 96)
    errors = []
    for steps in (1, 5):
        start = loftq_start(W, 16, steps)
        errors.append(float((W - from_nf4(start.quantised, W) - start.P @ start.R.mT).norm()))
    assert errors[1] < errors[0] < float((W - nf4_rounded(W)).norm())


def test_it_wants_a_quantised_base_and_the_same_as_others(tmp_path):
    recipe = exports.lay(tmp_path)
    with pytest.raises(ScaloraError, match="set quantization: nf4, or"):
        load_inputs(load_recipe(recipe, ["method=loftq"]))
    prints = {
        Inputs.of(load_inputs(load_recipe(recipe, [f"method={name}", "quantization=nf4-rounded"]))).base_model
        for name in ("lora", "loftq")
    }
    assert len(prints) == 1


def test_a_run_is_saved_with_its_own_base(tmp_path):
    quiet()
    run = exports.run(exports.lay(tmp_path), "run", *LOFTQ)
    logits = exports.logits(run.loading)
    moved = tmp_path / "moved"
    shutil.copytree(run.folder / "adapter", moved)
    loaded = scalora.load(moved)
    with torch.no_grad():
        torch.testing.assert_close(loaded.float()(input_ids=exports.IDS).logits, logits, rtol=0, atol=0)
    plain = scalora.load(tmp_path / "llama").state_dict()
    for name, module in loaded.get_base_model().named_modules():
        if hasattr(module, "base_layer"):
            assert not torch.equal(module.base_layer.weight, nf4_rounded(plain[f"{name}.weight"])), "three steps"
    with pytest.raises(ScaloraError, match="only its finished run"):
        scalora.load(run.folder / "checkpoints" / "checkpoint-4")
