"""What loading has found out about a model: which parts start at random, and what its base must be loaded with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..common.errors import ScaloraError

OUTPUTS = ("num_labels", "id2label", "label2id", "problem_type")
"""Values of a configuration that say what a classification head is of: the task decides them."""
_ATTRIBUTE = "scalora_origin"
_TRAINING_ONLY = ("drop", "initializer")
"""Parts of the names of values that change how a model is trained or made, and not what it computes."""


@dataclass(frozen=True)
class Origin:
    """Kept on the model itself, so that methods, fingerprints and loading lines know the same."""

    random: frozenset[str] = frozenset()
    """Names of the parameters that the source does not hold: drawn anew at every load."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What transformers' from_pretrained must be given besides the source."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Those of the options without which the base computes another function."""
    quantization: str = "none"
    """How the base weights are kept, as a recipe says it."""
    nf4: tuple[str, ...] = ()
    """Names of the modules whose weights are those of the source as NF4 keeps them."""


def origin(model: nn.Module) -> Origin:
    """What is known of a model, wrapped or not; nothing of one that :func:`~scalora.models.load.load_model` did not
    load."""
    return getattr(model, _ATTRIBUTE, None) or Origin()


def set_origin(model: nn.Module, found: Origin) -> None:
    """Keep ``found`` on the model."""
    setattr(model, _ATTRIBUTE, found)


def random_modules(model: nn.Module) -> list[str]:
    """Names of the modules that hold the parameters that start at random, in the model's order."""
    owners = {name.rpartition(".")[0] for name in origin(model).random}
    return [name for name, _ in model.named_modules() if name in owners]


def find_random(model: nn.Module, report: Mapping[str, Any], source: str, config: Mapping[str, Any]) -> frozenset[str]:
    """Names of the parameters of a freshly loaded classification model that its source does not hold.

    Args:
        model: transformers' model; only its head, and a pooler inside the backbone, may start at random.
        report: what transformers' ``output_loading_info`` gives, with mismatched sizes ignored.
        source: how messages call it.
        config: the recipe's overrides, which a message may have to blame.

    Raises:
        ScaloraError: weights of the backbone are missing or of another shape, or of the head in more than its number
            of outputs, or a parameter starts at random that no module of its own holds.
    """
    parameters, prefix = dict(model.named_parameters()), getattr(model, "base_model_prefix", "")
    way_out = (
        f"leave out of config what changes its shapes ({', '.join(config)})"
        if config
        else "give a checkpoint that holds all of them"
    )
    for name, there, wanted in sorted(report["mismatched_keys"]):
        # Another number of labels is another number of rows of the head's last layer, and nothing else.
        outputs = wanted[:1] == (model.config.num_labels,) and tuple(there[1:]) == tuple(wanted[1:])  # pyright: ignore
        if _in_backbone(name, prefix) or not outputs:
            raise ScaloraError(
                f"model: {name} of {source!r} is {_shape(there)}, but {_shape(wanted)} is wanted, so it would start at "
                f"random: {way_out}"
            )
    missing = sorted(name for name in report["missing_keys"] if name in parameters)
    for name in missing:
        if _in_backbone(name, prefix) and "pool" not in name.removeprefix(f"{prefix}.").split(".", 1)[0]:
            raise ScaloraError(f"model: {source!r} does not hold {name}, so it would start at random: {way_out}")
    found = frozenset([*missing, *(name for name, _, _ in report["mismatched_keys"])])
    for name in found:
        owner = name.rpartition(".")[0]
        if not owner or any(other.startswith(f"{owner}.") and other not in found for other in parameters):
            raise ScaloraError(
                f"model: {source!r} does not hold {name}, which no module of its own holds, so it can start at random "
                "but not be trained with the head: give another model, or a checkpoint that holds it"
            )
    return found


def set_outputs(
    configuration: Any, original: Any, num_labels: int, class_names: Sequence[str] | None
) -> dict[str, Any]:
    """Let a configuration have these outputs; what from_pretrained must be told of them besides their number.

    Args:
        configuration: what is changed.
        original: the source's own.
        num_labels: outputs of the classification head.
        class_names: of them, none for regression; None leaves the source's names and its loss.
    """
    configuration.num_labels = num_labels
    if class_names is None:
        return {}
    names = class_names or ["LABEL_0"]
    configuration.problem_type = "single_label_classification" if class_names else "regression"
    configuration.id2label = dict(enumerate(names))
    configuration.label2id = {name: i for i, name in enumerate(names)}
    told = ["id2label", "label2id"] if class_names else []
    told += ["problem_type"] if original.problem_type is not None else []
    return {
        name: getattr(configuration, name) for name in told if getattr(configuration, name) != getattr(original, name)
    }


def changes_function(config: Mapping[str, Any], original: Any) -> dict[str, Any]:
    """Those of the overrides ``config`` with which a model may compute something else.

    Args:
        config: values that replace those of the model's configuration.
        original: the source's own configuration.
    """
    return {
        name: value
        for name, value in config.items()
        if getattr(original, name) != value and not any(part in name for part in _TRAINING_ONLY)
    }


def _in_backbone(name: str, prefix: str) -> bool:
    # A model without a prefix is its own backbone.
    return not prefix or name.startswith(f"{prefix}.")


def _shape(size: Any) -> str:
    return "×".join(map(str, size))
