"""A tiny adapted model that lives: trained by one method after another, with all that is needed to make it again."""

from __future__ import annotations

import copy
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import scalora
from helpers import tokenized
from scalora import ScaLoraConfig
from scalora.engine.event import attached_to

VOCABULARY, TARGETS = tokenized.SIZE, ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(0, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
OPTIONS: list[dict[str, Any]] = [
    {},
    {},
    {"use_rslora": True},
    {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [2, 3]},
    {"lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "lm_head"]},
]


def write_base(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    tokenized.tokenizer().save_pretrained(folder)
    return folder


@cache
def _loaded(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def base_model(folder: Path) -> LlamaForCausalLM:
    return copy.deepcopy(_loaded(folder))


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    training = model.training
    out = model.eval()(input_ids=IDS).logits
    model.train(training)
    return out


class Life:
    """A model and what it stands on.

    ``written`` says that its base weights are not those in the base's folder any more.
    """

    model: Any
    optimizer: torch.optim.Optimizer | None = None
    handle: scalora.ScaLora | None = None

    def __init__(self, seed: int, base: Path, folder: Path) -> None:
        self.seed, self.rng, self.base, self.folder = seed, random.Random(seed), base, folder
        self.diary: list[str] = []  # what was done, for whoever reads a failure
        self.places = 0
        self.written = False
        self.native = self.rng.random() < 0.15
        self.name = self.rng.choice(["default", "default", "mine"])
        r = self.rng.randint(1, 3)
        options = {"r": r, "lora_alpha": 2 * r, "target_modules": TARGETS, **self.rng.choice(OPTIONS)}
        self.begin(LoraConfig(task_type="CAUSAL_LM", **options))

    def begin(self, config: LoraConfig) -> None:
        """A new adapter on the present base."""
        torch.manual_seed(self.rng.randint(0, 99))
        self.model, self.written = self.fresh(config, self.name, self.native), False
        self.optimizer = self.handle = None

    def fresh(self, config: LoraConfig, name: str, native: bool = False) -> Any:
        """The base with an adapter of this configuration."""
        model, config = base_model(self.base), copy.deepcopy(config)
        if not native:
            return get_peft_model(model, config, adapter_name=name)
        model.add_adapter(config, adapter_name=name)
        return model

    def place(self) -> Path:
        """A folder that is not there yet."""
        self.places += 1
        return self.folder / str(self.places)

    @property
    def config(self) -> LoraConfig:
        """The configuration of the adapter that is trained, with the ranks that are trained."""
        return copy.deepcopy(self.model.peft_config[self.name])

    def took(self, model: Any, name: str | None = None) -> None:
        """From now on it is this model, and the adapter of this name."""
        self.model, self.name = model, name or self.name
        self.native = not isinstance(model, PeftModel)
        self.optimizer = self.handle = None

    def train(self) -> None:
        """A few steps of one method."""
        how = self.rng.choice(["plain", "scalora", "scalora", "scalora", "refresh", "base"])
        if how == "refresh" and self.rank > 5:
            how = "scalora"  # a refresh needs twice as many directions
        if how != "plain" and self.written:
            how = "base"
        elif how == "base" and not self.may_write:
            how = "scalora"
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        if how == "plain" and (handle := attached_to(self.model)) is not None:
            handle.detach()  # another optimizer than the attached one would be noticed
        if how != "plain":
            capacity = self.rng.choice([None, max(self.rank, 4)])
            config = {
                "scalora": ScaLoraConfig(interval=1, capacity=capacity),
                "refresh": ScaLoraConfig(interval=self.rng.choice([None, 1]), refresh=2, capacity=capacity),
                "base": ScaLoraConfig(interval=1, accumulate="base"),
            }[how]
            self.handle = scalora.attach(self.model, self.optimizer, config)
            self.written = self.written or how == "base"
        steps = self.rng.randint(2, 6)
        self.model.train()
        for _ in range(steps):
            ids = torch.randint(
                0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(self.rng.randint(0, 999))
            )
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        left = self.rng.random() < 0.4
        if left and self.handle is not None:
            self.handle.detach()
            self.handle = None
        self.diary.append(f"trained {how} {steps} steps{', detached' if left else ''}")

    @property
    def rank(self) -> int:
        return max(layer.r[self.name] for layer in self.layers())

    @property
    def may_write(self) -> bool:
        """Whether accumulate='base' may write to the base weights."""
        held = any(getattr(layer, "held", lambda name: None)(self.name) for layer in self.layers())
        return not held and len(self.model.peft_config) == 1 and "lm_head" not in str(self.config.target_modules)

    def layers(self) -> list[Any]:
        return [m for m in self.model.modules() if self.name in getattr(m, "lora_A", ())]

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
