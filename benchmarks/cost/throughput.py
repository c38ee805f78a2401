"""Tokens a second of `scalora train` beside the same recipe in TRL's SFTTrainer, in turns in one process.

    python -m benchmarks.cost.throughput --data ../shared/data

SmolLM2 on GSM8K's solutions, a row each, and on SystemVerilog, packed to blocks by both. Seconds are of all steps but
the first (forward, backward, update; neither loading nor set-up). Of rows the real tokens of prompts and solutions
count, of blocks all.
"""

from __future__ import annotations

import tempfile
from functools import partial
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

ROWS, PACKED = "recipes/smollm2-gsm8k.yaml", "recipes/smollm2-systemverilog.yaml"


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
    packing = recipe.task.kind == "text"
    if packing:
        rows = [{"text": task.text(row)} for row in task.rows("train")]
    else:
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
            output_dir=place, max_length=recipe.task.max_length, use_cpu=True,  # pyright: ignore
            completion_only_loss=None if packing else True, packing=packing, packing_strategy="wrapped",
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


def grounds(data: str, rows: int) -> dict[str, tuple[Recipe, float]]:
    """Each recipe, with fewer rows, and the tokens of all its steps but the first."""
    few = ["task.data.validation_size=8", "task.data.test_size=8"]
    recipe = load_recipe(ROWS, [f"task.data.folder={data}", f"task.data.train_size={rows}", *few])
    _, tokenizer = load_model(recipe.model, head="causal-lm")
    tokens = sum(len(row["input_ids"]) for row in build_task(recipe.task).train_dataset(tokenizer))
    batch = recipe.training["per_device_train_batch_size"]
    found = {"rows": (recipe, (1 - batch / rows) * tokens)}
    recipe = load_recipe(PACKED, [f"task.data.train_size={rows}", *few, f"training.max_steps={rows // batch}"])
    batch = recipe.training["per_device_train_batch_size"]
    return found | {"packed": (recipe, (recipe.training["max_steps"] - 1) * batch * recipe.task.max_length)}  # pyright: ignore


def main() -> None:
    parser = record.parser(__doc__, "throughput.json")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = Table("", "", "tokens a second", "of TRL's", "least – most of the ratio")
    content: dict[str, Any] = {}
    for ground, (recipe, tokens) in grounds(options.data, options.rows).items():
        runs = {
            "TRL, LoRA": partial(with_trl, recipe),
            "scalora train, lora": partial(with_scalora, recipe, "lora"),
            "scalora train, scalora-i": partial(with_scalora, recipe, "scalora-i"),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                rates[name].append(tokens / run())
        for name, found in rates.items():
            ratios = sorted(a / b for a, b in zip(found, rates["TRL, LoRA"], strict=True))
            spread = f"{ratios[0]:.2f} – {ratios[-1]:.2f}"
            table.add_row(ground, name, f"{median(found):.0f}", f"{median(ratios):.2f}", spread)
        content[ground] = {"recipe": recipe.model_dump(mode="json"), "tokens": tokens, "tokens_per_second": rates}
    Console().print(table)
    record.write(options.output, content, trl=trl.__version__)


if __name__ == "__main__":
    main()
