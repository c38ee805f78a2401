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
        if self.model_accepts_loss_kwargs and (self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1):
            self.model_accepts_loss_kwargs = self._loss_is_by_items()

    def _loss_is_by_items(self) -> bool:
        """Whether the model divides its loss by `num_items_in_batch`; Trainer takes that of any that takes all words.

        One that does not has the mean of a batch as its loss, which is to be averaged over batches and processes.
        """
        assert self.model is not None
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))  # pyright: ignore
        with evaluating(self.model, None) as device:
            of_one, of_two = (
                self.model(**batch, num_items_in_batch=torch.tensor(count, device=device)).loss for count in (1, 2)
            )
        return bool(of_one != of_two)

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
