"""ScaLoRA in LLaMA-Factory, whose command line takes no callbacks and whose function does.

    python examples/trainers/llamafactory_train.py examples/trainers/llamafactory.yaml

What else `llamafactory-cli train` takes follows the file, as `output_dir=runs/other`. LLaMA-Factory 0.9.5 asks for an
older PEFT than scalora: install scalora after it, and set DISABLE_VERSION_CHECK=1.
"""

from __future__ import annotations

from llamafactory.train.tuner import run_exp

import scalora

CONFIG = {"interval": 10}  # fields of ScaLoraConfig; {} for its defaults

if __name__ == "__main__":
    run_exp(callbacks=[scalora.ScaLoraCallback(CONFIG)])
