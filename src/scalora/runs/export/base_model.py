"""The base model that an artefact was trained from, found and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from .artefact import Artefact, read_tensors
from ...common.errors import ScaloraError
from ...common.disk_layout import WEIGHTS
from ...common.disk_layout import TENSORS
from ...models.heads import Head
from ...models.load import backbone_fingerprint, load_model
from ..recipe import parse_recipe
from ...tasks import build_task

AUTO: dict[Head, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
_HEADS: dict[str, Head] = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}


class Base:
    """The base model of an artefact, to be loaded as often as it is needed.

    Raises:
        ScaloraError: nothing says which model it was, or what it computes.
    """

    def __init__(self, artefact: Artefact, source: str | None = None) -> None:
        name = source or artefact.base
        if name is None:
            raise ScaloraError(f"nothing in {str(artefact.folder)!r} names its base model: give it with --base")
        self.source: str = name
        self.artefact, recipe = artefact, artefact.recipe or {}
        self.head: Head = _head(artefact)
        self.num_labels = _num_labels(artefact) if self.head == "sequence-classification" else None
        self.config = recipe.get("config") or {}
        self.attention: str | None = recipe.get("attn_implementation")
        # A bare adapter does not say what it was trained in: the base's own dtype, as PEFT would load it.
        self.dtype: str = recipe.get("dtype") or artefact.config.get("dtype") or "auto"
        self.fingerprint: str | None = None
        self.padded_tokenizer: Any = None
        self.path = ""  # where transformers has found it

    def load(self) -> Any:
        """The model, in evaluation mode on the CPU.

        Raises:
            ScaloraError: it cannot be found, or it is another model than the one that was trained.
        """
        try:
            model, tokenizer = load_model(
                self.source, head=self.head, num_labels=self.num_labels, dtype=self.dtype, config=self.config,
                attn_implementation=self.attention,
            )  # fmt: skip
        except ScaloraError as error:
            raise ScaloraError(f"{error}; a base model that has moved is named by --base") from error
        self.fingerprint = backbone_fingerprint(model)
        if self.artefact.fingerprint not in (None, self.fingerprint):
            raise ScaloraError(
                f"the base model {self.source!r} has the fingerprint {self.fingerprint}, but "
                f"{self.artefact.fingerprint} was trained: give the right one with --base"
            )
        self.padded_tokenizer, self.path = tokenizer, model.name_or_path
        return model.eval()

    def publish(self, model: PreTrainedModel, folder: Path) -> None:
        """Save a model with the tokenizer and the padding that its base came with, not those of training."""
        if self.head == "causal-lm":  # a classifier needs the padding token to find a row's last one
            model.config.pad_token_id = AutoConfig.from_pretrained(self.path).pad_token_id
        model.save_pretrained(str(folder))
        if self.padded_tokenizer is not None:
            AutoTokenizer.from_pretrained(self.path).save_pretrained(str(folder))


def _head(artefact: Artefact) -> Head:
    """What the model computes: by the recipe's task, or by what the artefact says itself."""
    if artefact.recipe is not None:
        kind = artefact.recipe["task"]["kind"]
        return "sequence-classification" if kind in ("classification", "vectors") else "causal-lm"
    if artefact.kind == "wrapped":
        return artefact.config["head"]
    if artefact.kind == "model":
        named = str((artefact.config.get("architectures") or [""])[0])
        return "sequence-classification" if named.endswith("Classification") else "causal-lm"
    task = artefact.config.get("task_type") or "CAUSAL_LM"
    if task not in _HEADS:
        raise ScaloraError(
            f"{artefact.folder} has task_type {task}: only {' and '.join(_HEADS)} can be exported; load it with "
            "PEFT and call scalora.save_plain_lora"
        )
    return _HEADS[task]


def _num_labels(artefact: Artefact) -> int:
    """Outputs of the classification head: by the saved head itself, else by the model's configuration or the recipe."""
    files = {"lora": WEIGHTS, "peft": WEIGHTS, "wrapped": TENSORS}
    if artefact.kind in files:
        for name, tensor in read_tensors(artefact.folder / files[artefact.kind]).items():
            if name.endswith((".classifier.weight", ".score.weight", ".out_proj.weight")) and ".lora_" not in name:
                return tensor.shape[0]
    labels = artefact.config.get("num_labels") or len(artefact.config.get("id2label") or {})
    if labels:
        return labels
    if artefact.recipe is None:
        raise ScaloraError(
            f"{artefact.folder} holds no classification head, so nothing tells how many labels there are"
        )
    return build_task(parse_recipe(artefact.recipe).task).num_labels or 2
