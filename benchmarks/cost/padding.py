"""How much of a batch is padding, grouped by length and in random order: what packing could gain.

python -m benchmarks.cost.padding --data ../shared/data
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.trainer_pt_utils import LengthGroupedSampler

from scalora.models.load import load_model
from scalora.runs.recipe import load_recipe
from scalora.tasks import build_task

from .. import record

NEEDS_DATA = ("smollm2-gsm8k", "smollm2-arc-easy", "minilm-sst2", "minilm-mrpc")
RECIPES = ("demo", "minilm-sarcasm", *NEEDS_DATA)


def padding(lengths: Sequence[int], order: Sequence[int], batch: int) -> float:
    """Share of a run's token positions that hold padding, where rows are padded to the longest of their batch."""
    batches = [[lengths[row] for row in order[start : start + batch]] for start in range(0, len(order), batch)]
    return 1 - sum(map(sum, batches)) / sum(max(rows) * len(rows) for rows in batches)


def measure(name: str, data: Path) -> dict[str, float]:
    recipe = load_recipe(Path("recipes", f"{name}.yaml"), [f"task.data.folder={data}"] if name in NEEDS_DATA else [])
    task = build_task(recipe.task)
    _, tokenizer = load_model(recipe.model, head=task.head, num_labels=task.num_labels, config=recipe.config)
    dataset = task.train_dataset(tokenizer)
    lengths = [len(dataset[row]["input_ids"]) for row in range(len(dataset))]
    batch = recipe.training["per_device_train_batch_size"]
    shuffled = random.Random(0).sample(range(len(lengths)), len(lengths))
    grouped = list(LengthGroupedSampler(batch, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    return {
        "rows": len(lengths), "batch": batch, "mean_tokens": sum(lengths) / len(lengths), "most_tokens": max(lengths),
        "random": padding(lengths, shuffled, batch), "group_by_length": padding(lengths, grouped, batch),
    }  # fmt: skip


def main() -> None:
    parser = record.parser(__doc__, "padding.json")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    found = {name: measure(name, options.data) for name in RECIPES}
    table = Table("recipe", "tokens, mean", "longest", "padding, random order", "grouped by length")
    for name, row in found.items():
        shares = (f"{row[key]:.1%}" for key in ("random", "group_by_length"))
        table.add_row(name, f"{row['mean_tokens']:.0f}", f"{row['most_tokens']}", *shares)
    Console().print(table)
    record.write(options.output, {"recipes": found})


if __name__ == "__main__":
    main()
