"""Bytes that training holds beside the frozen base, counted by hand."""

import pytest

from helpers import workspace
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train

COUNTERS = 4 * 64  # of an optimizer's steps, one float per trained tensor


def held(folder, *options):
    return train(load_recipe(workspace.lay(folder), [*options, "training.save_strategy='no'"])).metrics


@pytest.mark.parametrize(("method", "copies"), [("lora", 4), ("full", 3)])
def test_trained_tensors_have_a_gradient_and_two_moments(tmp_path, method, copies):
    """And are themselves held beside the base, where they are not the base's own weights."""
    metrics = held(tmp_path, f"method={{name: {method}, rank: 2}}")
    exact = copies * 4 * metrics["trainable_parameters"]
    assert 0 < metrics["held_bytes"] - exact <= COUNTERS


def test_what_a_method_trains_by_an_optimizer_of_its_own_is_held(tmp_path):
    for name in ("plain", "scaled"):
        (tmp_path / name).mkdir()
    plain = held(tmp_path / "plain", "method={name: lora, rank: 2}")
    metrics = held(tmp_path / "scaled", "method={name: alpha-lora, rank: 2, options: {batch: 4}}")
    alphas = metrics["parameters"] - plain["parameters"]
    exact = 4 * 4 * (metrics["trainable_parameters"] + alphas)  # each α itself, its gradient and two moments
    assert 0 < metrics["held_bytes"] - exact <= COUNTERS


def test_what_a_store_and_a_refresh_keep_is_held(tmp_path):
    def of(name, method, **options):
        (tmp_path / name).mkdir()
        return held(
            tmp_path / name,
            f"method={{name: {method}, rank: 2}}",
            *(f"method.options.{k}={v}" for k, v in options.items()),
        )

    plain = of("plain", "lora")
    lora, adapters = plain["held_bytes"], 4 * plain["trainable_parameters"]
    slack = 0.2 * adapters  # factors and constants
    columns = (3 + 4 * 2) / 2  # capacity, and room for four events more, in units of the rank
    store = of("adapter", "scalora-i", interval=2, capacity=3)["held_bytes"]
    assert lora + columns * adapters <= store <= lora + columns * adapters + slack
    assert lora <= of("base", "scalora-i", interval=2, accumulate="base")["held_bytes"] <= lora + slack
    sketches = of("refresh", "scalora-refresh", refresh=2, accumulate="base")["held_bytes"]
    assert lora + 2 * adapters <= sketches <= lora + 2 * adapters + slack  # 2r columns of each side


def test_a_dense_gradient_counts_once_where_steps_are_taken_layer_by_layer(tmp_path):
    for name in ("whole", "single"):
        (tmp_path / name).mkdir()
    clipped = held(tmp_path / "whole", "method={name: fira, rank: 1}")
    single = held(tmp_path / "single", "method={name: fira, rank: 1}", "training.max_grad_norm=0")
    gradients = 4 * clipped["trainable_parameters"]
    assert clipped["held_bytes"] > gradients
    assert single["held_bytes"] < clipped["held_bytes"] - gradients / 2
