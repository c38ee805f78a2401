"""What every method with a frozen accumulated adapter needs from a Trainer: its return when a checkpoint is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...engine.checkpoint import load_accumulated


class AccumulatedCallback(TrainerCallback):
    """Trainer saves both adapters, but brings back and activates only the trained one; this does the rest."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            load_accumulated(self.model, Path(str(args.output_dir), f"checkpoint-{state.global_step}"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_accumulated(self.model, Path(state.best_model_checkpoint))
