"""What LoRA's trained update is worth at lower ranks than it was trained with: is rank missing, or a way to train it?

    python -m benchmarks.studies.truncation recipes/smollm2-gsm8k.yaml --set task.data.folder=../shared/data --seeds 3

Trains plain LoRA at the recipe's rate, cuts each layer's update to its best approximations of lower rank and scores
each on the test split. Adds to benchmarks/results/truncation.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from peft import PeftModel

from scalora.algebra.lowrank import truncate
from scalora.layers.peft_lora import find_layers
from scalora.models.load import load_model
from scalora.runs.precision import AUTOCAST, decide
from scalora.runs.recipe import Recipe, load_recipe
from scalora.runs.training import ADAPTER, train
from scalora.tasks import build_task

from .. import record


def main() -> None:
    """Run the seeds that are missing, then print means."""
    parser = record.parser(__doc__, "truncation.json")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    stored = record.earlier(given.output)
    key = f"{Path(given.recipe).stem}, r = {given.rank}"
    found = stored.setdefault(key, {"seeds": {}})
    for seed in map(str, range(given.seeds)):
        if seed not in found["seeds"]:
            found["seeds"][seed] = one_seed(given.recipe, given.set, given.rank, int(seed))
            found |= record.header()
            record.save(given.output, stored)
    for rank in next(iter(found["seeds"].values())):
        values = [metrics[rank]["nll"] for metrics in found["seeds"].values()]
        error = f" ± {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        print(f"{key} cut to {rank}: nll {mean(values):.4f}{error}")


def one_seed(place: str, overrides: list[str], rank: int, seed: int) -> dict[str, Any]:
    """Test metrics by rank, the trained one first."""
    with tempfile.TemporaryDirectory() as folder:
        own = [
            "method.name=lora", f"method.rank={rank}", f"method.alpha={2 * rank}", f"training.seed={seed}",
            'training.save_strategy="no"', f"output={folder}/run",
        ]  # fmt: skip
        recipe = load_recipe(place, [*overrides, *own])
        trained = train(recipe, split="test", baseline=False, ranks=False).metrics["after"]
        ranks = [2**i for i in reversed(range(rank.bit_length())) if 2**i < rank]
        return {str(rank): trained, **cut(recipe, ranks)}


@torch.no_grad()
def cut(recipe: Recipe, ranks: list[int]) -> dict[str, Any]:
    """Test metrics of a finished run's adapter at lower ranks, descending."""
    task = build_task(recipe.task)
    base, tokenizer = load_model(recipe.model, head=task.head, attn_implementation=recipe.attn_implementation)
    model = PeftModel.from_pretrained(base, Path(recipe.output) / ADAPTER, is_trainable=True)
    found = {}
    for rank in ranks:
        for layer in find_layers(model):
            best = truncate(layer.A.double(), layer.Bt.double().mT, rank)
            layer.A.zero_()[:, :rank] = best.P
            layer.Bt.zero_()[:rank] = best.Q.mT
        autocast = AUTOCAST[decide(recipe.precision, recipe.training).precision]
        score = task.score(model, tokenizer, "test", batch_size=recipe.score_batch_size, autocast=autocast)
        found[str(rank)] = score.metrics
    return found


if __name__ == "__main__":
    main()
