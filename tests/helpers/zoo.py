"""Adapted models of many kinds, each with what it takes to make it again, to train it and to compare it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import scalora
from helpers import models
from scalora import ScaLoraConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


class NamesAlike(nn.Module):
    """fc and block.fc: PEFT takes a pattern for the end of any name."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = Block(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(x))


class Attention(nn.Module):
    """torch's own attention, which PEFT adapts by merging for each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x, x, x)[0])


def _vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


def _tied() -> nn.Module:
    model = models.base("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def _resized(seed: int = 7) -> nn.Module:
    model = models.base("llama")
    torch.manual_seed(seed)
    model.resize_token_embeddings(models.VOCABULARY + 3, mean_resizing=False)
    return model


def _of(generator: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(generator))


@dataclass
class Kind:
    """One model and the adapter on it."""

    make: Callable[[], nn.Module]
    lora: dict[str, Any]
    inputs: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        torch.manual_seed(4)
        return self.make().eval()

    def adapted(self, **options: Any) -> PeftModel:
        base = self.base()
        torch.manual_seed(5)
        config = LoraConfig(**{"r": 2, "lora_alpha": 4, **copy.deepcopy(self.lora), **options})
        return get_peft_model(base, config).eval()  # pyright: ignore

    @torch.no_grad()
    def output(self, model: nn.Module, **options: Any) -> Tensor:
        return self._output(model, **options)

    def _output(self, model: nn.Module, **options: Any) -> Tensor:
        out = model(**self.inputs, **options) if "x" not in self.inputs else model(self.inputs["x"], **options)
        return out if isinstance(out, Tensor) else out.logits

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._output(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def trained(self, steps: int = 5, **config: Any) -> tuple[PeftModel, torch.optim.Optimizer, scalora.ScaLora]:
        """A model that has accumulated something, still attached."""
        model = self.adapted()
        optimizer = adamw(model)
        handle = scalora.attach(model, optimizer, ScaLoraConfig(**{"interval": 1, **config}))
        for _ in range(steps):
            self.step(model, optimizer)
        return model, optimizer, handle


def adamw(model: nn.Module, lr: float = 2e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def same(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


_IDS = {"input_ids": models.batch("llama", 9)["input_ids"]}
_NEW = {"input_ids": torch.cat([_IDS["input_ids"], torch.full((4, 1), models.VOCABULARY + 1)], 1)}
_LLAMA = {"target_modules": models.TARGETS["llama"], "task_type": "CAUSAL_LM"}


def _llama() -> nn.Module:
    return models.base("llama")


KINDS = {
    "llama": Kind(_llama, _LLAMA, _IDS),
    "bert": Kind(
        lambda: models.base("bert"), {"target_modules": models.TARGETS["bert"], "task_type": "SEQ_CLS"}, _IDS
    ),
    "gpt2": Kind(lambda: models.base("gpt2"), {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, _IDS),
    "vit": Kind(_vit, {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
                {"pixel_values": _of(1, 4, 3, 8, 8)}),
    "attention": Kind(Attention, {"target_modules": ["inner", "last"]}, {"x": _of(2, 4, 5, 8)}),
    "names alike": Kind(NamesAlike, {"target_modules": ["fc"], "rank_pattern": {"^fc": 3}}, {"x": _of(3, 4, 6)}),
    "patterns": Kind(
        _llama, _LLAMA | {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"up_proj": 7}, "use_rslora": True}, _IDS
    ),
    "token indices": Kind(_llama, _LLAMA | {"trainable_token_indices": [1, 2, 3]}, _IDS),
    "saved targets": Kind(
        _llama, {"target_modules": "all-linear", "modules_to_save": ["lm_head", "down_proj"]}, _IDS
    ),
    "resized": Kind(_resized, _LLAMA | {"modules_to_save": ["embed_tokens", "lm_head"]}, _NEW),
    "tied": Kind(_tied, {"target_modules": ["q_proj", "lm_head"]}, _IDS),
}  # fmt: skip
