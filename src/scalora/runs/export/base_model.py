"""The base model that an artefact was trained from, found and loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ...common.disk_layout import REPLACED, TENSORS, WEIGHTS
from ...common.errors import ScaloraError
from ...methods import method_class
from ...methods.support.nf4_base import base_note, read_nf4_base, round_to_nf4
from ...methods.support.targets import find_targets
from ...models.base_print import fingerprint_as
from ...models.heads import HEADS, Head, head_of_architecture, head_of_task_type, is_output
from ...models.load import load_model
from ...models.origin import origin, set_origin
from ...models.packed import is_packed, unpack
from ...models.processors import image_processor
from ...tasks import build_task, task_class
from ..recipe import parse_recipe
from .artefact import Artefact, read_tensors


class Base:
    """The base model of an artefact, to be loaded as often as it is needed; a tokenizer may be missing where it may.

    Raises:
        ScaloraError: nothing says which model it was, or what it computes.
    """

    def __init__(self, artefact: Artefact, source: str | None = None, *, need_tokenizer: bool = True) -> None:
        name = source or artefact.base
        if name is None:
            raise ScaloraError(
                f"nothing in {str(artefact.folder)!r} names its base model: give it with --base (Python: base=)"
            )
        self.source: str = name
        self.artefact, recipe = artefact, artefact.made_by or {}
        self.head: Head = head_of(artefact)
        self.num_labels = _num_labels(artefact, self.head) if HEADS[self.head].labelled else None
        self.class_names = _class_names(artefact, self.num_labels)
        self.note = base_note(artefact.folder)
        # Of an adapter with layers of its own outside of its run: what its file says.
        self.config: dict[str, Any] = (
            recipe.get("config") or artefact.config.get("base_config") or self.note.get("config", {})
        )
        self.attention: str | None = recipe.get("attn_implementation")
        # A bare adapter does not say what it was trained in: the base's own dtype, as PEFT would load it.
        self.dtype: str = recipe.get("dtype") or artefact.config.get("dtype") or self.note.get("dtype", "auto")
        self.quantization: str = recipe.get("quantization") or self.note.get("quantization", "none")
        self.need_tokenizer = need_tokenizer
        self.fingerprint: str | None = None
        self.overrides: dict[str, Any] = {}  # without which it computes something else
        self.padded_tokenizer: Any = None
        self.path = ""  # where transformers has found it

    def load(self) -> Any:
        """The model, in evaluation mode on the CPU.

        Raises:
            ScaloraError: it cannot be found, or it is another model than the one that was trained.
        """
        try:
            model, tokenizer = self._loaded()
        except ScaloraError as error:
            raise ScaloraError(
                f"{error}; the base model is named {self.source!r} in {str(self.artefact.folder)!r}: where it has "
                f"moved, or a relative path was for another folder than {str(Path.cwd())!r}, name it with --base "
                "(Python: base=)"
            ) from error
        self.fingerprint = fingerprint_as(model, self.quantization)
        if self.artefact.fingerprint not in (None, self.fingerprint):
            raise ScaloraError(
                f"the base model {self.source!r} has the fingerprint {self.fingerprint}, but "
                f"{self.artefact.fingerprint} was trained: give the right one with --base (Python: base=)"
            )
        self._round(model)
        self.overrides = dict(origin(model).overrides)
        self.padded_tokenizer, self.path = tokenizer, model.name_or_path
        return model.eval()

    def _loaded(self, quantization: str = "none") -> tuple[Any, Any]:
        return load_model(
            self.source, head=self.head, num_labels=self.num_labels, class_names=self.class_names,
            dtype=self.dtype, config=self.config, attn_implementation=self.attention,
            need_tokenizer=self.need_tokenizer, quantization=quantization,
        )  # fmt: skip

    def _round(self, model: Any) -> None:
        """Make the base weights what was trained on."""
        recipe = self.artefact.made_by
        if is_packed(self.quantization):
            packed, _ = self._loaded(self.quantization)
            unpack(packed, model)
            set_origin(model, replace(origin(model), quantization=self.quantization))
        elif self.note:
            read_nf4_base(self.artefact.folder, model)
        if self.note or self.quantization != "nf4-rounded" or recipe is None:
            return
        spec = parse_recipe(recipe).method
        if method_class(spec.name).quantises:
            raise ScaloraError(
                f"{self.artefact.folder}: {spec.name} has base weights of its own, which only its finished run holds: "
                "give that run"
            )
        round_to_nf4(model, [name for name, _ in find_targets(model, spec, self.head)])

    def publish(self, model: PreTrainedModel, folder: Path) -> None:
        """Save a model with the tokenizer and the padding that its base came with, not those of training.

        A chat template that the recipe gave goes along: the model has learnt no other.
        """
        if not HEADS[self.head].labelled:  # a classifier needs the padding token to find a row's last one
            # Not every configuration (CodeGen's, RWKV's) knows such a token.
            model.config.pad_token_id = getattr(AutoConfig.from_pretrained(self.path), "pad_token_id", None)
        model.save_pretrained(str(folder))
        if self.head == "image-classification":
            image_processor(self.path).save_pretrained(str(folder))
        elif self.padded_tokenizer is not None:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
            given = ((self.artefact.made_by or {}).get("task") or {}).get("chat_template")
            tokenizer.chat_template = given or tokenizer.chat_template
            tokenizer.save_pretrained(str(folder))


def head_of(artefact: Artefact) -> Head:
    """What the model computes: by the recipe's task, or by what the artefact says itself.

    Raises:
        ScaloraError: there is no such task or head here.
    """
    if artefact.made_by is not None:
        return task_class(artefact.made_by["task"]["kind"]).head
    if artefact.kind == "wrapped":
        return artefact.config["head"]
    if artefact.kind == "model":
        return head_of_architecture(str((artefact.config.get("architectures") or [""])[0]))
    if artefact.kind == "delta":
        heads: list[Head] = [head for head in HEADS if _outputs(artefact, head)]
        return heads[0] if heads else "causal-lm"
    made_for = (artefact.config.get("auto_mapping") or {}).get("base_model_class")
    if made_for and not artefact.config.get("task_type"):
        return head_of_architecture(str(made_for))
    head = head_of_task_type(artefact.config.get("task_type"))
    if head is None:
        known = " and ".join(facts.task_type for facts in HEADS.values() if facts.task_type)
        raise ScaloraError(
            f"{artefact.folder} has task_type {artefact.config['task_type']}: only {known} are known here; load it "
            "with PEFT and call scalora.save_plain_lora"
        )
    return head


def _outputs(artefact: Artefact, head: Head) -> int | None:
    """Rows of a head that was saved as a whole; None where there is no such head."""
    files = {"lora": WEIGHTS, "peft": WEIGHTS, "wrapped": TENSORS, "delta": REPLACED}
    file = artefact.folder / files.get(artefact.kind, "")
    tensors = read_tensors(file) if file.is_file() else {}
    return next((tensor.shape[0] for name, tensor in tensors.items() if is_output(name, head)), None)


def _num_labels(artefact: Artefact, head: Head) -> int:
    """Outputs of a head: by the saved head itself, else by the model's configuration or the recipe."""
    if outputs := _outputs(artefact, head):
        return outputs
    labels = artefact.config.get("num_labels") or len(artefact.config.get("id2label") or {})
    if labels:
        return labels
    if artefact.made_by is None:
        raise ScaloraError(
            f"{artefact.folder} holds no classification head, so nothing tells how many labels there are"
        )
    return build_task(parse_recipe(artefact.made_by).task).num_labels or 2


def _class_names(artefact: Artefact, num_labels: int | None) -> list[str] | None:
    """What the run called its classes; None where there was no run, and the base's own configuration has to do."""
    record = artefact.metrics or artefact.export or {}
    if num_labels is None or artefact.made_by is None or "class_names" in record:
        return record.get("class_names")
    try:  # an unfinished run has no record yet
        return build_task(parse_recipe(artefact.made_by).task).class_names
    except ScaloraError:  # its data may be gone; the base's own names may be those of other classes
        return [f"LABEL_{i}" for i in range(num_labels)] if num_labels > 1 else []
