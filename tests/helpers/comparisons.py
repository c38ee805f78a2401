"""A small comparison, and results of its trials without their training."""

from helpers import workspace
from scalora.arena.contender import parse_contender
from scalora.arena.plan import Chosen, Comparison
from scalora.runs.recipe import load_recipe

ENVIRONMENT = {"processor": "fast", "threads": 1, "gpu": None, "versions": {"torch": "2"}}


def small(folder, *overrides):
    """LoRA at two ranks and ScaLoRA on a tiny model: twelve trials."""
    recipe = load_recipe(workspace.lay(folder), ["task.data.validation_size=10", "training.max_steps=4", *overrides])
    contenders = tuple(parse_contender(text, 2) for text in ("lora", "scalora", "lora@4"))
    return Comparison(recipe, contenders, (1e-3, 1e-2), (0, 1), (0,))


def fake_result(comparison, trial, *, calls=None, broken=None):
    """ScaLoRA is better than LoRA by 0.05, and 1e-2 than 1e-3 by 0.1."""
    if calls is not None:
        calls.append(trial)
    if broken and broken(trial):
        return {"error": "out of memory"}
    value = 0.5 + 0.1 * (trial.lr == 1e-2) + 0.01 * trial.seed + 0.05 * (trial.contender.method == "scalora")
    costs = {"seconds_per_step": 1.0, "peak_memory_bytes": 100, "trainable_parameters": 10, "adapter_bytes": 5}
    costs |= {"held_bytes": 160, "steps": 4}
    return {
        "environment": ENVIRONMENT,
        "after": {"accuracy": value, "nll": 1 - value}, "primary": "accuracy", "higher_is_better": True, **costs,
        "ranks": [{"step": 2, "mean": 2.0, "kinds": {}}], "losses": [[2, 1.0], [4, 0.5]],
    }  # fmt: skip


def run_all(comparison, calls=None):
    """The results of all trials, with 1e-2 chosen, as tuning would choose."""
    trials = comparison.tuning() + comparison.final({c: Chosen(c, 1e-2) for c in comparison.contenders})
    return {trial: fake_result(comparison, trial, calls=calls) for trial in trials}
