"""ScaLoRA in transformers' Trainer and everything built on it: one callback."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..common.errors import ScaloraError, named
from .attach import attach, prepare
from .checkpoint import load_base, read_state, save_state, writes_beside
from .config import ScaLoraConfig, as_config, refuse_settings
from .event import ScaLora
from .stores.peft_model import WholeFolders


class ScaLoraCallback(TrainerCallback):
    """Makes a Trainer train ScaLoRA: ``Trainer(..., callbacks=[ScaLoraCallback()])``, nothing else changes.

    The model must be a PEFT LoRA model by the time training begins (TRL's ``peft_config`` is fine). Median factors, the
    relative size of the moved difference and the share of layers solved by Theorem 5 join the ordinary logs as
    ``scalora/*``. Checkpoints hold one plain LoRA, which PEFT loads alone, and a small ``scalora.safetensors``.

    Args:
        config: defaults to ``ScaLoraConfig()``; a dict of its fields is taken too.
        resume_from: the checkpoint that ``trainer.train(resume_from_checkpoint=...)`` is given. Only a sharded model,
            or one that is no PeftModel, needs it, where that is not the Trainer's own ``output_dir/checkpoint-N``.

    Raises:
        ScaloraError: ``resume_from`` is no folder, or training does not begin there; and as :func:`scalora.attach`,
            when training begins.
    """

    def __init__(
        self,
        config: ScaLoraConfig | Mapping[str, Any] | None = None,
        *,
        resume_from: str | Path | None = None,
        **unknown: Any,
    ) -> None:
        refuse_settings(unknown)
        if unknown:
            raise ScaloraError(f"ScaLoraCallback was given {', '.join(unknown)}: it takes config and resume_from")
        self.config = as_config(config)
        if resume_from is not None and not (isinstance(resume_from, str | Path) and os.path.isdir(resume_from)):
            raise ScaloraError(f"resume_from is {named(resume_from)}, which is no folder: name a checkpoint's")
        self.resume_from = resume_from
        self.handle: ScaLora | None = None  # of the present or last training
        self.saved: int | None = None  # the step of its latest checkpoint, where we write it

    def on_init_end(self, args, state, control, **kwargs) -> None:
        # Before the model is wrapped for distribution, and before a checkpoint is loaded into its layers.
        if (model := kwargs.get("model")) is not None:
            prepare(model, self.config)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        model = kwargs["model"]
        config = self.config.of_run(state.max_steps)
        refuse_too_few(config, state.max_steps)
        if getattr(args, "teacher_model_kind", None) == "ema":  # TRL's self-distillation
            raise ScaloraError(
                "teacher_model_kind is 'ema', which averages the factors of adapters: events change their columns, so "
                "that means of them have no meaning; choose 'base' or 'live'"
            )
        if self.resume_from is not None and self.handle is None and state.global_step == 0:
            raise ScaloraError(
                f"resume_from is {str(self.resume_from)!r}, but training begins anew: call "
                "trainer.train(resume_from_checkpoint=...) with it, or leave it out"
            )
        if self.handle is not None:
            self.handle.detach()  # of a training that an exception has ended
        self.handle, self.saved = attach(model, kwargs["optimizer"], config), None
        adapter = self.handle.layers[0].adapter
        loaded = loaded_from(model, adapter)
        # PEFT puts an adapter that is not called "default" into a folder of its own.
        whole = loaded.parent if loaded is not None and adapter != "default" and loaded.name == adapter else loaded
        if state.global_step > 0:
            folder = Path(self.resume_from or whole or _checkpoint(args, state))
            refuse_incomplete(folder, args)
            ours = folder / adapter if loaded != whole else folder
            state_then = read_state(ours)  # what is no checkpoint of ours is refused before anything changes
            if self.config.accumulate == "base":
                load_base(self.handle.layers, model, ours)
            self.handle.load_state_dict(state_then)
        elif whole is not None and (whole / "optimizer.pt").is_file() and not (whole / TRAINER_STATE_NAME).is_file():
            raise ScaloraError(f"checkpoint {whole} lacks {TRAINER_STATE_NAME}: resume from a whole one")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if control.should_save:  # our part first: once Trainer's is there it deletes older checkpoints
            self.on_save(args, state, control, **kwargs)

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs) -> None:
        """Write what the model's own saving does not: every process helps to gather what is sharded."""
        if self.handle is not None and not writes_beside(kwargs["model"]) and self.saved != state.global_step:
            save_state(self.handle, _checkpoint(args, state), args.should_save)
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
        model, best = kwargs["model"], state.best_model_checkpoint
        if args.load_best_model_at_end and best and not writes_beside(model):
            # Trainer has put back what is trained, and only that.
            self.handle.store.load_state_dict(read_state(Path(best))["store"])
            if self.config.accumulate == "base":
                load_base(self.handle.layers, model, Path(best))


def log_figures(handle: ScaLora) -> dict[str, float]:
    """Figures of the latest event, and the numbers of refreshes so far and of layers left, as the logs name them."""
    counts = {} if handle.refresh is None else {"scalora/refreshes": float(len(handle.refresh.steps))}
    if handle.left:
        counts["scalora/left"] = float(len(handle.left))
    if not (event := handle.history.latest()):
        return counts
    return counts | {
        "scalora/alpha": event.alpha[1],
        "scalora/beta": event.beta[1],
        "scalora/moved": event.moved,
        "scalora/discarded": event.discarded,
        "scalora/column_share": event.shares.get("column", 0.0),
    }


def loaded_from(model: nn.Module, adapter: str) -> Path | None:
    """The folder that the model's adapter was loaded from, if the model has seen it."""
    found = (module.loaded_from.get(adapter) for module in model.modules() if isinstance(module, WholeFolders))
    return next(found, None)


def refuse_incomplete(folder: Path, args: TrainingArguments) -> None:
    """Refuse a checkpoint without all that a resumed run needs to be the one that went on.

    Raises:
        ScaloraError: it names what is missing.
    """
    rng = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
    # FSDP's two forms, and DeepSpeed's
    sharded = any(any(folder.glob(name)) for name in ("pytorch_model_fsdp*", "optimizer_0*", "global_step*/*optim*"))
    scaled = args.fp16 and args.device.type != "cpu"  # there accelerate scales no loss
    needed = [*([] if sharded else ["optimizer.pt"]), "scheduler.pt", rng, *(["scaler.pt"] if scaled else [])]
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise ScaloraError(
            f"checkpoint {folder} lacks {', '.join(missing)}, without which a resumed run is another one: take a whole "
            "checkpoint (save_only_model writes none), or start anew from this adapter"
        )


def refuse_too_few(config: ScaLoraConfig, steps: int) -> None:
    """Raise ScaloraError where nothing is to happen but refreshes, and none comes within so many steps."""
    every = config.period
    if config.interval is None and every is not None and every >= steps:
        raise ScaloraError(
            f"refresh is {every}, but training has {steps} steps, so that none would take place: lower it"
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    if args.output_dir is None:
        raise ScaloraError("TrainingArguments.output_dir is not set: a resumed run needs it to find its checkpoint")
    if state.is_hyper_param_search:
        raise ScaloraError(
            "hyperparameter_search names folders that a model without PEFT's save_pretrained, or a sharded one, is not "
            "told: wrap it with peft.get_peft_model, or search without saving"
        )
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
