"""How two models compare: logits on inputs that are always the same, and the loss on held-out examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...common.errors import ScaloraError
from ...tasks import Split, build_task
from ..recipe import parse_recipe
from .artefact import Artefact
from .base_model import Base

_BATCH = 8


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Logits on a few inputs that are the same every time: random tokens, pixels, or vectors for a dense network.

    Computed in float32 whatever the weights are in, so that two models with the same function agree closely.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if getattr(_plain(model), "main_input_name", "") == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        shape = size if isinstance(size, list | tuple) else (size, size)
        inputs = {"pixel_values": torch.rand(4, getattr(config, "num_channels", 3), *shape, generator=generator)}
    elif config.model_type == "scalora-dense":
        inputs = {"inputs_embeds": torch.rand(8, config.widths[0], generator=generator)}
    else:
        most = getattr(config, "max_position_embeddings", None) or 16  # XLNet's -1 means any
        length = min(16, most) if most > 0 else 16
        ids = torch.randint(0, config.get_text_config().vocab_size, (4, length), generator=generator)
        if config.is_encoder_decoder and isinstance(ending := config.eos_token_id, int):
            # The classifiers of BART and T5 read the row's last end-of-text token, of which all rows must have as many.
            ids[ids == ending] = (ending + 1) % config.get_text_config().vocab_size
            ids[:, -1] = ending
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder and _plain(model).can_generate():
            inputs["labels"] = ids  # what its decoder reads
    with _in_float32(model):
        return model(**inputs).logits


def _plain(model: Any) -> Any:
    """transformers' model in one that PEFT may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Weights in bf16 and fp16 are float32 for a while; the way there and back loses nothing."""
    halves = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    try:
        for p, _ in halves:
            p.data = p.data.float()
        yield
    finally:
        for p, dtype in halves:
            p.data = p.data.to(dtype)


class HeldOutLoss:
    """The training loss on held-out examples of the run's recipe; where there are none, ``about`` says why."""

    def __init__(self, artefact: Artefact, base: Base, count: int) -> None:
        self.batches: list[Any] = []
        if artefact.recipe is None:
            self.about = "no loss: there is no recipe.yaml, so no data to measure it on"
        elif count == 0:
            self.about = "no loss: none was asked for"
        else:
            try:
                self.about = self._load(artefact.recipe, base, count)
            except ScaloraError as error:  # the data of an old run may be gone; the export itself does not need it
                self.about = f"no loss: {error}"

    def _load(self, recipe: dict[str, Any], base: Base, count: int) -> str:
        task = build_task(parse_recipe(recipe, "the run's recipe.yaml").task)
        split: Split = "validation" if task.splits.validation else "test"
        tokenizer = base.padded_tokenizer
        dataset = task.train_dataset(tokenizer, split)
        if task.compares:
            task.refer(base.load(), tokenizer, {split: dataset}, _BATCH, None)
        self.task = task
        chosen = [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // count))][:count]
        collate = task.collator(tokenizer)
        self.batches = [collate(chosen[i : i + _BATCH]) for i in range(0, len(chosen), _BATCH)]
        return f"mean over {len(chosen)} {split} examples"

    @torch.no_grad()
    def measure(self, model: Any) -> float | None:
        if not self.batches:
            return None
        self.task.equip(model)
        sizes = [len(batch["labels"]) for batch in self.batches]
        losses = [float(model(**batch).loss) for batch in self.batches]
        return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
