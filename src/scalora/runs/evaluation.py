"""The validation data of a recipe while it is trained: transformers' Trainer with the task's own metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from ..common.errors import ScaloraError
from ..tasks.scoring import evaluating


class RecipeTrainer(Trainer):
    """Evaluates without a trace in what is trained: the random state is the same as if it had not.

    `eval_loss` is the training loss on the validation rows, Trainer's mean over batches. Where
    `metric_for_best_model` asks for another metric than the loss, all of the task's metrics join it.

    Args:
        metrics: measures those metrics on the validation rows, by their names.
        arguments: Trainer's own.

    Raises:
        ScaloraError: `metric_for_best_model` is none of them.
    """

    def __init__(self, *args: Any, metrics: Callable[[], dict[str, float]], **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self._metrics = metrics
        # Trainer divides what it smooths by itself, too.
        shared = self.model_accepts_loss_kwargs and self.label_smoother is None
        shared = shared and (self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1)
        self._loss_is_a_mean = shared and not self._loss_is_by_items()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's, where a model whose loss is the mean over its own batch counts by its labels among all.

        The mean of such means would be another loss wherever batches have unlike numbers of labels.
        """
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._loss_is_a_mean or num_items_in_batch is None:
            return found
        loss, outputs = found if return_outputs else (found, None)
        labels = inputs.get("shift_labels", inputs["labels"])
        loss = loss * (labels.ne(-100).sum().to(loss) / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _loss_is_by_items(self) -> bool:
        """Whether the model divides its loss by `num_items_in_batch`; Trainer takes that of all that take any words."""
        assert self.model is not None
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))  # pyright: ignore
        with evaluating(self.model, None) as device:
            of_one, of_two = (
                self.model(**batch, num_items_in_batch=torch.tensor(count, device=device)).loss for count in (1, 2)
            )
        return bool(of_one != of_two)

    def _run_epoch(self, *args: Any, **options: Any) -> Any:
        # Resumed from its last checkpoint, a run of `max_steps` would take one step more: Trainer counts after a step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        with torch.random.fork_rng(devices, device_type=self.args.device.type):
            output = super().evaluation_loop(*args, **options)
            wanted = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
            if wanted != "loss":
                measured = self._metrics()
                check_metric(wanted, measured)
                metrics: dict[str, float] = output.metrics  # pyright: ignore[reportAssignmentType]
                metrics.update({f"eval_{name}": value for name, value in measured.items()})
        return output


def check_metric(name: str, measured: dict[str, float]) -> None:
    """Raise ScaloraError where a metric to choose a checkpoint by is none that the task has."""
    if name not in ("loss", *measured):
        raise ScaloraError(
            f"training.metric_for_best_model is {name!r}, which this task has not: choose loss or {', '.join(measured)}"
        )
