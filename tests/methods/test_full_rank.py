"""Full rank from a small optimizer state, step by step against the definitions, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TrainingArguments

from helpers import training
from scalora import ScaloraError
from scalora.algebra.compressed_state import growth_limited, random_rows
from scalora.methods.apollo_mini import ApolloMiniOptimizer, ApolloMiniOptions
from scalora.methods.fira import FiraOptimizer
from scalora.methods.flora import FloraOptimizer

RANK, EVERY, RATE, BETA1, BETA2, EPS = 3, 4, 0.01, 0.8, 0.95, 1e-8
KINDS = {
    "apollo-mini": lambda *given: ApolloMiniOptimizer(ApolloMiniOptions(every=EVERY), *given),
    "fira": lambda *given: FiraOptimizer(RANK, EVERY, *given),
    "flora": lambda *given: FloraOptimizer(RANK, EVERY, *given),
}
sides = st.integers(3, 9)


def arguments(tmp="unused", **options):
    defaults = {"learning_rate": RATE, "adam_beta1": BETA1, "adam_beta2": BETA2, "adam_epsilon": EPS, "seed": 7}
    return TrainingArguments(output_dir=str(tmp), use_cpu=True, report_to="none", **{**defaults, **options})


def holding(weight):
    """A model of one weight, w."""
    model = nn.Module()
    model.register_parameter("w", weight)
    return model


def rows(rank, size, period):
    return random_rows(rank, size, torch.zeros(1, dtype=torch.float64), 7, "w", period)


def left(P, G):
    """R and the matrix L of R ↦ its expansion, written for the side that is compressed, as ``L @ R`` or ``R @ L``."""
    return (P @ G, lambda R: P.T @ R) if G.shape[0] < G.shape[1] else (G @ P.T, lambda R: R @ P)


def adam(history):
    """Adam's direction of the last of a list of gradients, as sums over all of them."""
    t = len(history)
    m = sum((1 - BETA1) * BETA1 ** (t - 1 - i) * g for i, g in enumerate(history)) / (1 - BETA1**t)
    v = sum((1 - BETA2) * BETA2 ** (t - 1 - i) * g**2 for i, g in enumerate(history)) / (1 - BETA2**t)
    return m / (v.sqrt() + EPS)


def limited(norms, U):
    """U with a norm of at most 1.01 times the last of ``norms``, which gets one more."""
    if norms and U.norm() > 1.01 * norms[-1]:
        U = 1.01 * norms[-1] * U / U.norm()
    norms.append(U.norm())
    return U


def apollo_mini(gradients, W, period):
    seen, norms = [], []
    for t, G in enumerate(gradients):
        R, _ = left(rows(1, min(G.shape), t // period), G)
        seen.append(R)
        yield limited(norms, math.sqrt(128) * G * adam(seen).norm() / R.norm())


def fira(gradients, W, period):
    seen, norms = [], []
    for t, G in enumerate(gradients):
        if t % period == 0:
            U, _, Vt = torch.linalg.svd(G)
            P = U[:, :RANK].T if G.shape[0] < G.shape[1] else Vt[:RANK]
        R, back = left(P, G)
        seen.append(R)
        N, rest = adam(seen), G - back(R)
        scaled = torch.empty_like(rest)
        if G.shape[0] < G.shape[1]:
            for j in range(G.shape[1]):
                scaled[:, j] = rest[:, j] * N[:, j].norm() / R[:, j].norm()
        else:
            for i in range(G.shape[0]):
                scaled[i] = rest[i] * N[i].norm() / R[i].norm()
        yield back(N) + limited(norms, scaled)


def flora(gradients, W, period):
    row, column, P, c = 0, 0, None, None
    for t, G in enumerate(gradients, 1):
        beta = 1 - t**-0.8
        row = beta * row + (1 - beta) * (G**2).mean(1)
        column = beta * column + (1 - beta) * (G**2).mean(0)
        h = G / (torch.outer(row, column) / row.mean()).sqrt()
        P = rows(RANK, min(G.shape), 0) if P is None else P
        down, back = left(P, h)
        c = torch.zeros_like(down) if c is None else c
        u = (1 - BETA1) * h + BETA1 * back(c)
        if t % period == 0:
            P, momentum = rows(RANK, min(G.shape), t // period), back(c)
            c, (down, _) = left(P, momentum)[0], left(P, h)
        c = BETA1 * c + (1 - BETA1) * down
        rms = (W**2).mean().sqrt(), (u**2).mean().sqrt()
        yield max(1e-3, rms[0]) * u / max(1, rms[1])


DEFINITIONS = {"apollo-mini": apollo_mini, "fira": fira, "flora": flora}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25)
@given(m=sides, n=sides, decay=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99))
def test_every_step_is_the_definition(name, m, n, decay, seed):
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(m, n, dtype=torch.float64))
    optimizer = KINDS[name](holding(weight), {"w": weight}, arguments(weight_decay=decay))
    gradients = [torch.randn(m, n, dtype=torch.float64) * 10.0 ** (i % 3) for i in range(2 * EVERY + 2)]
    W = weight.detach().clone()
    steps = DEFINITIONS[name](gradients, W, EVERY)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        U = next(steps)  # of the weights before the step, which the definition reads
        W.mul_(1 - RATE * decay).sub_(RATE * U)
        torch.testing.assert_close(weight.detach(), W, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_the_state_is_no_larger_than_that_of_a_lora_of_the_rank(name, shape):
    weight = nn.Parameter(torch.randn(shape))
    optimizer = KINDS[name](holding(weight), {"w": weight}, arguments())
    weight.grad = torch.randn(shape)
    optimizer.step()
    held = sum(value.numel() for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    assert 0 < held <= 2 * sum(shape) * RANK + 1


def test_a_step_grows_by_a_hundredth_at_most_and_shrinks_at_will():
    U = torch.randn(3, 4)
    shorter, norm = growth_limited(100 * U, U.norm())
    torch.testing.assert_close((shorter, norm), (1.01 * U, 1.01 * U.norm()))
    assert torch.equal(growth_limited(0.5 * U, U.norm())[0], 0.5 * U)
    assert growth_limited(0 * U, U.norm())[1] == 0


@pytest.mark.parametrize("name", ["apollo-mini", "fira"])
@pytest.mark.parametrize("silent", [0, 2])
def test_a_gradient_of_zeros_does_not_stop_a_weight_for_ever(name, silent):
    """As the first one is below a head of zeros, or that of an expert without a token."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 9, dtype=torch.float64))
    optimizer = KINDS[name](holding(weight), {"w": weight}, arguments())
    for step in range(silent + 2):
        before, weight.grad = weight.detach().clone(), torch.randn_like(weight) * float(step != silent)
        optimizer.step()
    assert torch.linalg.matrix_rank(weight.detach() - before, atol=1e-4) > RANK  # the rest moves too, not PᵀR̃ alone


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_one_layer_at_a_time_give_the_same_weights(name, tmp_path):
    found = []
    for at_once in (True, False):
        adapted = training.adapt(name, "bert", tmp_path / "base")
        made = training.trainer(
            adapted, "bert", tmp_path / "out", learning_rate=5e-3, max_grad_norm=0 if at_once else 1e9
        )
        largest, count = [], sum(p.requires_grad for p in adapted.model.parameters())
        made.optimizer.register_step_pre_hook(
            lambda *_, largest=largest, model=adapted.model: largest.append(
                sum(p.grad is not None for p in model.parameters())
            )
        )
        made.train()
        head = sum(p.requires_grad for p in adapted.model.classifier.parameters())
        assert set(largest) == {head if at_once else count}
        found.append({key: value.clone() for key, value in adapted.model.state_dict().items()})
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_accumulated_gradients_are_not_used_one_by_one():
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = KINDS["fira"](holding(weight), {"w": weight}, arguments(max_grad_norm=0, gradient_accumulation_steps=2))
    before = weight.detach().clone()
    weight.sum().backward()
    assert torch.equal(weight, before)
    assert optimizer.gradient_bytes() == weight.nbytes


@pytest.mark.parametrize("name", KINDS)
def test_a_run_in_bfloat16_learns(name, tmp_path):
    adapted = training.adapt(name, "llama", tmp_path / "base")
    made = training.trainer(
        adapted, "llama", tmp_path / "out", learning_rate=5e-3, bf16=True, lr_scheduler_type="linear"
    )
    made.train()
    losses = training.losses(made)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in adapted.model.parameters())


@pytest.mark.parametrize("name", ["fira", "flora"])
def test_a_rank_must_fit_the_weights(name, tmp_path):
    with pytest.raises(ScaloraError, match="choose 16 or less"):
        training.adapt(name, "llama", tmp_path / "base", rank=17)


@pytest.mark.parametrize(("every", "expected"), [(0, 2), (5, 5)])
def test_flora_s_period_is_a_sixth_of_the_run_where_none_is_given(every, expected, tmp_path):
    adapted = training.adapt("flora", "llama", tmp_path / "base", options={"every": every})
    made = training.trainer(adapted, "llama", tmp_path / "out", max_steps=12)
    made.train()
    assert made.optimizer.optimizer.every == expected
