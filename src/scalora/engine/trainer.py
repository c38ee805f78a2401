"""ScaLoRA in transformers' Trainer and everything built on it: one callback."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..common.errors import ScaloraError
from ..layers.peft_lora import ACCUMULATED
from .attach import attach, prepare
from .checkpoint import load_moved, read_state, save_moved, save_state
from .config import ScaLoraConfig
from .event import ScaLora


class ScaLoraCallback(TrainerCallback):
    """Makes a Trainer train ScaLoRA: ``Trainer(..., callbacks=[ScaLoraCallback()])``, nothing else changes.

    The model must be a PEFT LoRA model by the time training begins (TRL's ``peft_config`` is fine). Median factors, the
    relative size of the moved difference and the share of layers solved by Theorem 5 join the ordinary logs as
    ``scalora/*``. Checkpoints gain the accumulated adapter (PEFT saves it) and a small ``scalora.safetensors``.

    Args:
        config: defaults to ``ScaLoraConfig()``.
        resume_from: the checkpoint that ``trainer.train(resume_from_checkpoint=...)`` is given, where that is not the
            Trainer's own ``output_dir/checkpoint-N``.

    Raises:
        ScaloraError: as :func:`scalora.attach`, when training begins.
    """

    def __init__(self, config: ScaLoraConfig | None = None, *, resume_from: str | Path | None = None) -> None:
        self.config = config or ScaLoraConfig()
        self.resume_from = resume_from
        self.handle: ScaLora | None = None  # of the present or last training
        self.saved: int | None = None  # the step of its latest checkpoint

    def on_init_end(self, args, state, control, **kwargs) -> None:
        model = kwargs.get("model")
        # Before the model is wrapped for distribution, and before a checkpoint is loaded into its adapters.
        if model is not None:
            adapters = {name for m in model.modules() if isinstance(m, PeftModel) for name in m.peft_config}
            if self.config.accumulate == "adapter" and {"ref", ACCUMULATED} <= adapters:
                raise ScaloraError(
                    "TRL has made adapter 'ref', the reference, of the trained adapter without what the accumulated "
                    "adapter holds: join the two with scalora.save_plain_lora and train the result, loaded anew"
                )
            prepare(model, self.config)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        model = kwargs["model"]
        every = self.config.refresh
        if self.config.interval is None and every is not None and every >= state.max_steps:
            raise ScaloraError(
                f"refresh is {every}, but training has {state.max_steps} steps, so that none would take place: lower it"
            )
        self.handle, self.saved = attach(model, kwargs["optimizer"], self.config), None
        if state.global_step > 0:
            checkpoint = Path(self.resume_from or _checkpoint(args, state))
            state_then = read_state(checkpoint)  # what is no checkpoint of ours is refused before anything changes
            load_moved(self.handle, model, checkpoint)
            self.handle.load_state_dict(state_then)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if control.should_save:  # our part first: once Trainer's is there it deletes older checkpoints
            self.on_save(args, state, control, **kwargs)

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.handle is not None and self.saved != state.global_step:
            # Every process helps to gather what is sharded.
            save_state(self.handle, _checkpoint(args, state), args.should_save)
            save_moved(self.handle, kwargs["model"], _checkpoint(args, state), args.should_save)
            self.saved = state.global_step

    def on_log(self, args, state, control, **kwargs) -> None:
        logs = kwargs.get("logs")
        if self.handle is None or logs is None or "loss" not in logs or not (figures := log_figures(self.handle)):
            return
        logs.update(figures)  # what is printed and what later callbacks see
        state.log_history[-1].update(figures)  # what trainer_state.json keeps

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.handle is None:
            return
        self.handle.detach()
        if args.load_best_model_at_end and state.best_model_checkpoint:
            # Trainer has put back the trained adapter of that checkpoint only.
            load_moved(self.handle, kwargs["model"], Path(state.best_model_checkpoint))


def log_figures(handle: ScaLora) -> dict[str, float]:
    """Figures of the latest event, and the number of refreshes so far, under their names in the logs."""
    refreshes = {} if handle.refresh is None else {"scalora/refreshes": float(len(handle.refresh.steps))}
    if not (event := handle.history.latest()):
        return refreshes
    return refreshes | {
        "scalora/alpha": event.alpha[1],
        "scalora/beta": event.beta[1],
        "scalora/moved": event.moved,
        "scalora/discarded": event.discarded,
        "scalora/column_share": event.shares.get("column", 0.0),
    }


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    if args.output_dir is None:
        raise ScaloraError("TrainingArguments.output_dir is not set: a resumed run needs it to find its checkpoint")
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
