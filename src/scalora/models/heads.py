"""What a model computes: each head once, with its classes in transformers and PEFT, and the lines that load it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .origin import origin, random_modules

Head = Literal["causal-lm", "sequence-classification", "token-classification", "image-classification", "seq2seq-lm"]


@dataclass(frozen=True)
class HeadFacts:
    """How transformers and PEFT call one head, and what its modules are called in their models."""

    auto: str
    """transformers' Auto class; PEFT's is AutoPeft… of the same, where it knows the head."""
    mapping: str
    """transformers' table of the configurations that have such a model."""
    task_type: str | None
    """PEFT's name, in adapter_config.json too; None where it has none."""
    architectures: tuple[str, ...]
    """How the names of such classes end, in a model's config.json, where transformers' table does not have them."""
    labelled: bool
    """Whether it has num_labels outputs, and so may start at random."""
    modules: tuple[str, ...] = ()
    """Parts of the names of the modules that are trained as a whole."""
    outputs: tuple[str, ...] = ()
    """Last parts of the names of the layers whose rows are the outputs."""
    spared: bool = False
    """Whether PEFT, by its name for the head alone, trains those modules and leaves them out of "all-linear"."""


HEADS: dict[Head, HeadFacts] = {
    "causal-lm": HeadFacts(
        "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", "CAUSAL_LM", ("ForCausalLM", "LMHeadModel"), False
    ),
    "sequence-classification": HeadFacts(
        "AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "SEQ_CLS",
        ("ForSequenceClassification", "Classifier"), True, ("classifier", "score"),
        ("classifier", "score", "out_proj", "logits_proj", "linear_out"), True,
    ),
    "token-classification": HeadFacts(
        "AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "TOKEN_CLS",
        ("ForTokenClassification",), True, ("classifier", "score"), ("classifier", "score"),
    ),
    "image-classification": HeadFacts(
        "AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", None,
        ("ForImageClassification",), True, ("classifier",), ("classifier",),
    ),
    "seq2seq-lm": HeadFacts(
        "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "SEQ_2_SEQ_LM", (), False
    ),
}  # fmt: skip


def auto_class(head: Head) -> Any:
    """transformers' Auto class of a head."""
    import transformers

    return getattr(transformers, HEADS[head].auto)


def fits(config: Any, head: Head) -> bool:
    """Whether there is such a model of this configuration (transformers' PreTrainedConfig)."""
    import transformers

    if type(config) not in getattr(transformers, HEADS[head].mapping):
        return False
    if head == "seq2seq-lm" and not config.is_encoder_decoder:  # some of sound and text are in that table too
        return False
    # transformers would wrap a BERT as a causal model that attends both ways: a number, but a meaningless one.
    two_way = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return not (two_way and head == "causal-lm")


def head_of_task_type(task_type: str | None) -> Head | None:
    """The head that PEFT calls so, a causal language model where it says nothing; None for others."""
    wanted = task_type or HEADS["causal-lm"].task_type
    return next((head for head, facts in HEADS.items() if facts.task_type == wanted), None)


def head_of_architecture(name: str) -> Head:
    """The head of a class of models, by its name; a causal language model where that says nothing."""
    from transformers.models.auto import modeling_auto

    def knows(facts: HeadFacts) -> bool:
        return name in getattr(modeling_auto, f"{facts.mapping}_NAMES").values()

    ending: list[Head] = [head for head, facts in HEADS.items() if name.endswith(facts.architectures)]
    fitting: list[Head] = [*ending, *(head for head, facts in HEADS.items() if knows(facts))]
    return fitting[0] if fitting else "causal-lm"


def find_heads(model: nn.Module, head: Head) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a plain model that must be trained as a whole, whatever the method is.

    They are the classification head, and all else that started at random: poolers, layers before the head.
    """
    parts = HEADS[head].modules
    named = [name for name, _ in model.named_children() if any(part in name for part in parts)]
    others = [name for name in random_modules(model) if not is_within(name, named)]
    yield from ((name, model.get_submodule(name)) for name in (*named, *others))


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter, by its name, is one of the modules or lies in one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def is_output(parameter: str, head: Head) -> bool:
    """Whether a parameter, by its name in a saved file, is a trained head's last weight: a row for each label."""
    *_, layer, kind = ("", *parameter.split("."))
    return kind == "weight" and layer in HEADS[head].outputs and ".lora_" not in parameter


def loading_lines(head: Head, path: Path) -> list[str]:
    """Lines of Python that load a whole model with plain transformers."""
    auto = HEADS[head].auto
    return [f"from transformers import {auto}", f"model = {auto}.from_pretrained({str(path)!r})", "model.eval()"]


def peft_loading_lines(head: Head, path: Path, model: nn.Module) -> list[str]:
    """Lines of Python that load a PEFT adapter of ``model``, and its base model as it was, with plain PEFT."""
    auto = f"AutoPeft{HEADS[head].auto.removeprefix('Auto')}" if HEADS[head].task_type else "AutoPeftModel"
    labels = {"num_labels": model.config.num_labels} if HEADS[head].labelled else {}  # pyright: ignore
    given = "".join(f", {name}={value!r}" for name, value in {**labels, **origin(model).options}.items())
    return [f"from peft import {auto}", f"model = {auto}.from_pretrained({str(path)!r}{given})", "model.eval()"]
