"""Tokens a second of `scalora train` beside the same recipe in TRL's SFTTrainer, in turns in one process.

    python -m benchmarks.cost.throughput --data ../shared/data

SmolLM2 on GSM8K's solutions: recipes/smollm2-gsm8k.yaml with fewer rows. Counted are the real tokens of prompts and
solutions over the seconds of all steps but the first (forward, backward, update; neither loading nor set-up).
"""

from __future__ import annotations

import tempfile
from statistics import median
from typing import Any

import datasets
import trl
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from scalora.models.load import load_model
from scalora.runs.callbacks import StepTimer
from scalora.runs.precision import decide
from scalora.runs.recipe import Recipe, load_recipe
from scalora.runs.training import Watcher, train
from scalora.tasks import build_task

from .. import record

RECIPE = "recipes/smollm2-gsm8k.yaml"


class Timed(Watcher):
    def __init__(self) -> None:
        self.timer = StepTimer()
        self.callbacks = (self.timer,)


def with_scalora(recipe: Recipe, method: str) -> float:
    """Seconds of the steps after the first."""
    with tempfile.TemporaryDirectory() as place:
        changed = recipe.model_copy(
            update={"output": f"{place}/run", "method": recipe.method.model_copy(update={"name": method})}
        )
        watcher = Timed()
        train(changed, split="validation", baseline=False, ranks=False, watcher=watcher)
    return sum(watcher.timer.seconds[1:])


def with_trl(recipe: Recipe) -> float:
    task: Any = build_task(recipe.task)
    rows = [{"prompt": task.prompt(row), "completion": task.completion(row)} for row in task.rows("train")]
    model, tokenizer = load_model(
        recipe.model, head="causal-lm", dtype=recipe.dtype, attn_implementation=recipe.attn_implementation
    )
    spec, timer = recipe.method, StepTimer()
    targets: Any = spec.target_modules
    with tempfile.TemporaryDirectory() as place:
        same = recipe.training | {"report_to": [], "save_strategy": "no"}
        same["bf16"] = decide(recipe.precision, recipe.training).precision == "bfloat16"
        arguments = trl.SFTConfig(
            output_dir=place, max_length=recipe.task.max_length, completion_only_loss=True, use_cpu=True,  # pyright: ignore
            gradient_checkpointing=False, disable_tqdm=True, **same,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=spec.rank, lora_alpha=int(spec.scaled_alpha), target_modules=targets, task_type="CAUSAL_LM"
            ),
            callbacks=[timer],
        )
        trainer.train()
    return sum(timer.seconds[1:])


def main() -> None:
    parser = record.parser(__doc__, "throughput.json")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = [f"task.data.train_size={options.rows}", "task.data.validation_size=8", "task.data.test_size=8"]
    recipe = load_recipe(RECIPE, [f"task.data.folder={options.data}", *sizes])
    _, tokenizer = load_model(recipe.model, head="causal-lm")
    tokens = sum(len(row["input_ids"]) for row in build_task(recipe.task).train_dataset(tokenizer))
    runs = {
        "TRL, LoRA": lambda: with_trl(recipe),
        "scalora train, lora": lambda: with_scalora(recipe, "lora"),
        "scalora train, scalora-i": lambda: with_scalora(recipe, "scalora-i"),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    share = 1 - recipe.training["per_device_train_batch_size"] / options.rows
    for _ in range(options.rounds):
        for name, run in runs.items():
            rates[name].append(share * tokens / run())
    table = Table("", "tokens a second", "of TRL's", "least – most of the ratio")
    for name, found in rates.items():
        ratios = sorted(a / b for a, b in zip(found, rates["TRL, LoRA"], strict=True))
        table.add_row(name, f"{median(found):.0f}", f"{median(ratios):.2f}", f"{ratios[0]:.2f} – {ratios[-1]:.2f}")
    Console().print(table)
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "tokens": tokens,
        "tokens_per_second": rates,
    }
    record.write(options.output, content, trl=trl.__version__)


if __name__ == "__main__":
    main()
