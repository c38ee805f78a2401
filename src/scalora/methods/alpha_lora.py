"""α-LoRA (2510.21345): LoRA beside a frozen layer whose output rows are rescaled by factors learned on other data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainerCallback

from ..common.disk_layout import ALPHA_STATE
from ..common.errors import ScaloraError
from ..models.heads import Head
from .method import Adapted, Family, Method
from .support.gradients import batch_loss, gradients_of
from .support.wrappers import Wrapper, save_wrapped, wrap_linear, wrapped_spectra


class AlphaLoraOptions(BaseModel):
    """Options of :class:`AlphaLora`."""

    model_config = ConfigDict(extra="forbid")

    lr: float = Field(default=5e-3, gt=0, description="Learning rate of α (Adam, betas 0.9 and 0.99, constant).")
    every: int = Field(default=10, ge=1, description="T: training steps from one update of α to the next.")
    batch: int = Field(default=64, ge=1, description="Held-out rows per update of α.")
    share: float = Field(default=0.1, gt=0, lt=1, description="Held-out share of the training set; one batch at least.")


class AlphaLoraLinear(Wrapper):
    """A linear layer n → m with lora_A (r×n, Kaiming), lora_B (m×r, zero) and alpha (m, ones)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base)
        if rank > min(base.in_features, base.out_features):
            raise ScaloraError(
                f"method.rank is {rank}, but a targeted layer is {base.out_features}x{base.in_features}: choose "
                f"{min(base.in_features, base.out_features)} or less"
            )
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        # Not trainable in the ordinary sense: the training data and its optimizer must not touch it.
        self.alpha = nn.Parameter(torch.ones(base.out_features), requires_grad=False)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(…, n) → (…, m)."""
        y = self.base(x)
        update = nn.functional.linear(
            nn.functional.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A), self.lora_B
        )
        return (self.alpha * y + self.scale * update).to(y.dtype)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        weight = self.alpha[:, None] * self.base.weight.float() + self.scale * self.lora_B @ self.lora_A
        return weight, None if self.base.bias is None else self.alpha * self.base.bias.float()


class AlphaLora(Method):
    """y = α∘(W₀x + b) + s·BAx, one α per output row, initially 1."""

    name = "alpha-lora"
    summary = "α-LoRA (2510.21345): LoRA plus a factor per frozen row, learned on held-out rows"
    family = Family.LAYERS
    packed = ()
    Options = AlphaLoraOptions
    Wrapper = AlphaLoraLinear

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        assert isinstance(self.options, AlphaLoraOptions)
        rank, scale, dropout = self.spec.rank, self.spec.scaled_alpha / self.spec.rank, self.spec.dropout
        wrappers = wrap_linear(model, self.spec, head, lambda base: AlphaLoraLinear(base, rank, scale, dropout))
        callback = AlphaCallback([w.alpha for w in wrappers.values() if isinstance(w, AlphaLoraLinear)], self.options)
        return Adapted(
            model,
            lambda path: save_wrapped(model, wrappers, head, path, self.name, rank=rank, scale=scale),
            lambda: wrapped_spectra(wrappers),
            [callback],
            split_train=callback.split_train,
        )


class AlphaCallback(TrainerCallback):
    """Updates α on a held-out batch every T steps, first after the first step (as the official code does)."""

    def __init__(self, alphas: list[nn.Parameter], options: AlphaLoraOptions) -> None:
        self.options = options
        self.alphas = alphas
        self.optimizer = torch.optim.Adam(alphas, lr=options.lr, betas=(0.9, 0.99))
        self.held_out: Subset[Any] | None = None

    def split_train(self, dataset: Any) -> Any:
        """Keep a random part of the training set, the same at every call, and return the rest.

        Raises:
            ScaloraError: less than half of it would be left.
        """
        count = max(self.options.batch, round(self.options.share * len(dataset)))
        if 2 * count > len(dataset):
            raise ScaloraError(
                f"alpha-lora would hold out {count} of {len(dataset)} training rows for α: give more rows, or lower "
                "method.options.batch or share"
            )
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        self.held_out = Subset(dataset, order[:count])
        return Subset(dataset, sorted(order[count:]))

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.held_out is None:
            raise ScaloraError("alpha-lora has no held-out rows: train on what Adapted.split_train(dataset) returns")
        if state.global_step > 0:
            file = Path(str(args.output_dir), f"checkpoint-{state.global_step}", ALPHA_STATE)
            self.optimizer.load_state_dict(torch.load(file, weights_only=True))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        update, due = divmod(state.global_step - 1, self.options.every)
        if due != 0:
            return
        assert self.held_out is not None
        rows = self._rows(update, args.seed)
        batch = kwargs["train_dataloader"].collate_fn([self.held_out[i] for i in rows])
        for alpha in self.alphas:
            alpha.requires_grad_(True)
        with torch.random.fork_rng():  # dropout must not shift the randomness of the run itself
            gradients = gradients_of(batch_loss(kwargs["model"], batch, args), self.alphas)
        for alpha, gradient in zip(self.alphas, gradients, strict=True):
            alpha.requires_grad_(False)
            alpha.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def on_save(self, args, state, control, **kwargs) -> None:
        if not args.should_save:
            return
        file = Path(str(args.output_dir), f"checkpoint-{state.global_step}", ALPHA_STATE)
        torch.save(self.optimizer.state_dict(), file)

    def _rows(self, update: int, seed: int) -> list[int]:
        """Held-out rows of one update: passes over all of them, each shuffled anew; nothing to be kept for a resume."""
        assert self.held_out is not None
        batches = len(self.held_out) // self.options.batch
        turn, place = divmod(update, batches)
        order = torch.randperm(len(self.held_out), generator=torch.Generator().manual_seed(seed + turn)).tolist()
        return order[place * self.options.batch :][: self.options.batch]


METHODS = (AlphaLora,)
