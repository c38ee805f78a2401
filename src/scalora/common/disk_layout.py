"""Every file and folder name that we write, or that PEFT and transformers write for us."""

from __future__ import annotations

# A checkpoint or an adapter: PEFT's weights, the folder that once held half of them, and our own files.
WEIGHTS = "adapter_model.safetensors"
FORMER_PAIR = "accumulated"  # where scalora once put the other half of an adapter
STATE_FILE, BASE_FILE = "scalora.safetensors", "scalora_base.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of the model it wraps

# Beside an adapter on a quantised base: how it is, and weights that are more than the base model's in few bits.
QUANTISED_BASE, FORMER_NF4_BASE = "quantised_base.safetensors", "nf4_base.safetensors"

# A run; and the last file of a folder that is complete.
RECIPE, INPUTS, METRICS = "recipe.yaml", "inputs.json", "metrics.json"
CHECKPOINTS, ADAPTER = "checkpoints", "adapter"
SEAL = "seal.json"

# An adapter with layers of its own (mora, alpha-lora), and the state of α's optimizer in its checkpoints.
TENSORS, SETTINGS = "adapter.safetensors", "adapter.json"
ALPHA_STATE = "alpha_optimizer.pt"

# An export: what it was made from and how good it is; the dense difference, and parameters that are replaced.
EXPORT = "export.json"
DELTA, REPLACED = "delta.safetensors", "replaced.safetensors"

# A comparison or an experiment: every result, this machine's queue of trials, and the pages made of results.
RESULTS, QUEUE = "results.json", "trials.sqlite3"
REPORT, TABLES = "report.html", "tables.md"
UNSENT = "unsent-{}.json"  # a result on its way to a database that machines share
