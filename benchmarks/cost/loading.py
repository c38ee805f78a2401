"""What starting costs: the help, the import, and the way to the end of the first training step beside plain PEFT.

    python -m benchmarks.cost.loading

Each is a process of its own, started in turns; seconds from its start to its end, medians.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from rich.console import Console
from rich.table import Table

from scalora.common.packaged import fetch

from .. import record

FIRST_STEP = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
{attach}
ids = torch.ones(16, 64, dtype=torch.long)
model(input_ids=ids, labels=ids[:, 0]).loss.backward()
optimizer.step()
"""
ATTACH = "import scalora; scalora.attach(model, optimizer)"


def main() -> None:
    parser = record.parser(__doc__, "loading.json")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = str(fetch("minilm-l6-v2"))
    commands = {
        "scalora --help": ["-m", "scalora", "--help"],
        "import scalora": ["-c", "import scalora"],
        "import torch, transformers, peft": ["-c", "import torch, transformers, peft; peft.LoraConfig"],
        "first step of MiniLM, PEFT": ["-c", FIRST_STEP.format(attach=""), model],
        "first step of MiniLM, scalora.attach": ["-c", FIRST_STEP.format(attach=ATTACH), model],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(-1, options.rounds):  # the first round fills the disk's cache
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    table = Table("what", "seconds", "least", "most")
    for name, values in seconds.items():
        table.add_row(name, *(f"{v:.2f}" for v in (median(values), min(values), max(values))))
    Console().print(table)
    content = {
        "seconds": seconds,
        "median": {name: median(values) for name, values in seconds.items()},
    }
    record.write(options.output, content)


if __name__ == "__main__":
    main()
