"""The benchmarks of the ScaLoRA paper, GLUE and eight commonsense sets, as `task` sections of recipes."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import ScaloraError
from .harness import GIVEN_ROWS


class _Glue(NamedTuple):
    config: str
    """Its name in nyu-mll/glue on the hub."""
    columns: dict[str, str]
    """Column on the hub -> in the release's .tsv: one or two texts, then the label."""
    labels: tuple[str, ...]
    """As the release writes them, in the order of the hub's numbers; none for regression."""
    max_length: int
    """The ScaLoRA paper's, in tokens."""
    metric: str = "accuracy"
    dev: tuple[str, str] = ("dev", "validation")
    """The labelled split that is not for training: the release's file, and the hub's name."""
    keep_missing: bool = False
    """Whether some of its texts are empty or a word such as n/a."""


_BINARY = ("0", "1")
_INFERENCE = ("entailment", "not_entailment")
_PAIR = {"sentence1": "sentence1", "sentence2": "sentence2"}
_MNLI = {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}

GLUE_TASKS = {
    # CoLA's files have no header: its columns are positions.
    "CoLA": _Glue("cola", {"sentence": "3", "label": "1"}, _BINARY, 64, "matthews"),
    "SST-2": _Glue("sst2", {"sentence": "sentence", "label": "label"}, _BINARY, 128),
    "MRPC": _Glue("mrpc", {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}, _BINARY, 128),
    "STS-B": _Glue("stsb", {**_PAIR, "label": "score"}, (), 128, "pearson_spearman"),
    "QQP": _Glue(
        "qqp",
        {"question1": "question1", "question2": "question2", "label": "is_duplicate"},
        _BINARY,
        320,
        keep_missing=True,
    ),
    "MNLI": _Glue(
        "mnli",
        _MNLI,
        ("entailment", "neutral", "contradiction"),
        256,
        dev=("dev_matched", "validation_matched"),
        keep_missing=True,
    ),
    "QNLI": _Glue("qnli", {"question": "question", "sentence": "sentence", "label": "label"}, _INFERENCE, 512),
    "RTE": _Glue("rte", {**_PAIR, "label": "label"}, _INFERENCE, 320),
    "WNLI": _Glue("wnli", {**_PAIR, "label": "label"}, _BINARY, 128),  # not in the paper
}
"""Name, which is that of the release's folder too -> the facts of a GLUE task."""


class _Commonsense(NamedTuple):
    folder: str
    """In LLM-Adapters' `dataset`."""
    hub: str
    """Where lm-evaluation-harness loads it from, or the same data: `datasets` 4 no longer runs the scripts of
    ybisk/piqa and allenai/social_i_qa."""
    test_split: str
    """On the hub, where most test sets have no labels."""
    harness: str
    """Its name in lm-evaluation-harness."""
    normalize: str = "none"
    """By length where lm-evaluation-harness reports acc_norm, which divides by the characters of a choice."""
    extra: dict[str, Any] = {}
    """More of the task section."""
    replaces: bool = False
    """Whether its form has other texts in a column of the set's own, and so must be asked for."""


COMMONSENSE = {
    # Both forms have true first.
    "BoolQ": _Commonsense(
        "boolq", "google/boolq", "validation", "boolq", extra={"choices": [" yes", " no"]}, replaces=True
    ),
    "PIQA": _Commonsense("piqa", "baber/piqa", "validation", "piqa", "length"),
    "SIQA": _Commonsense("social_i_qa", "lighteval/siqa", "validation", "social_iqa", replaces=True),
    "HellaSwag": _Commonsense("hellaswag", "Rowan/hellaswag", "validation", "hellaswag", "length"),
    "WinoGrande": _Commonsense(
        "winogrande", "allenai/winogrande:winogrande_xl", "validation", "winogrande", extra={"continuation": "{after}"}
    ),
    "ARC-e": _Commonsense("ARC-Easy", "allenai/ai2_arc:ARC-Easy", "test", "arc_easy", "length"),
    "ARC-c": _Commonsense("ARC-Challenge", "allenai/ai2_arc:ARC-Challenge", "test", "arc_challenge", "length"),
    "OBQA": _Commonsense("openbookqa", "allenai/openbookqa:main", "test", "openbookqa", "length"),
}
"""Name -> the facts of a commonsense set."""

PROMPTS = {
    "BoolQ": "{passage}\nQuestion: {question}?\nAnswer:",
    "PIQA": "Question: {question}\nAnswer: ",
    "SIQA": "Q: {question}\nA: ",
    "HellaSwag": "{question} ",
    "WinoGrande": "{before}{choice} ",
    "ARC-e": "Question: {question}\nAnswer: ",
    "ARC-c": "Question: {question}\nAnswer: ",
    "OBQA": "{question} ",
}
"""lm-evaluation-harness's own prompts, in the columns of `tasks.data.forms`; the space at an end goes to the choice.

SIQA's question begins with its context, HellaSwag's is activity and context. WinoGrande is scored by how likely each
option, in its place, makes the rest of the sentence (partial evaluation): every choice has a prompt of its own.
"""

_JSON_PROMPTS = {**PROMPTS, "BoolQ": "Question: {question}\nAnswer:"}  # no passage, and the question has its mark


def glue_task(
    name: str,
    data: Path | None,
    *,
    train_size: int | None = None,
    validation_size: int | None = None,
    test_size: int | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """The `task` section of a GLUE task, which is scored on the dev set: GLUE hides the test set's labels.

    Args:
        name: one of `GLUE_TASKS`.
        data: the folder with the release's files, `glue/<name>/train.tsv` and so on; None takes them from the hub.
        train_size: rows to train on; None is all.
        validation_size: rows split off from train to choose a checkpoint by; None is none.
        test_size: rows of the dev set to score; None is all.
        max_length: tokens; None is the ScaLoRA paper's.

    Raises:
        ScaloraError: there is no such task.
    """
    glue: _Glue = _known("GLUE task", name, GLUE_TASKS)
    *texts, label = glue.columns
    task: dict[str, Any] = {"kind": "classification", "data": {}}
    labels: list[Any] = list(glue.labels if data else range(len(glue.labels)))
    if data:
        renamed = {ours: theirs for ours, theirs in glue.columns.items() if ours != theirs}
        task["data"] = _files(data, f"glue/{name}/train.tsv", f"glue/{name}/{glue.dev[0]}.tsv")
        task["data"] |= {"columns": renamed} if renamed else {}
    else:
        task["data"] = _hub(f"nyu-mll/glue:{glue.config}", glue.dev[1])
    task["data"] |= _sizes(train_size, validation_size, test_size)
    if glue.keep_missing:
        task["data"]["missing"] = "keep"
    if labels:
        task["data"]["values"] = {label: labels}
        task["labels"] = list(labels)
    else:
        task["regression"] = True
    task |= dict(zip(("text", "text_pair"), texts, strict=False))
    return task | {"label": label, "metric": glue.metric, "max_length": max_length or glue.max_length}


def commonsense_task(
    name: str,
    data: Path | None,
    *,
    train_size: int | None = None,
    validation_size: int | None = None,
    test_size: int | None = None,
    max_length: int | None = None,
    harness: bool = False,
) -> dict[str, Any]:
    """The `task` section of a commonsense set, scored by the likelihood of its choices as lm-evaluation-harness does.

    Args:
        name: one of `COMMONSENSE`.
        data: the folder with LLM-Adapters' JSON, `commonsense/<folder>/train.json` and `test.json`; None takes the
            set from the hub, and scores on validation where the test set has no labels.
        train_size: rows to train on; None is all.
        validation_size: rows split off from train to choose a checkpoint by; None is none.
        test_size: rows to score; None is all.
        max_length: tokens; None is the ScaLoRA paper's 256.
        harness: let lm-evaluation-harness itself score, by its own task where the set is from the hub.

    Raises:
        ScaloraError: there is no such set.
    """
    facts: _Commonsense = _known("commonsense set", name, COMMONSENSE)
    folder = f"commonsense/{facts.folder}"
    source = _files(data, f"{folder}/train.json", f"{folder}/test.json") if data else _hub(facts.hub, facts.test_split)
    form = {"form": "published"} if facts.replaces else {}
    return {
        "kind": "multiple_choice",
        "data": source | _sizes(train_size, validation_size, test_size) | form,
        "prompt": (_JSON_PROMPTS if data else PROMPTS)[name],
        "normalize": facts.normalize,
        "max_length": max_length or 256,
        **facts.extra,
        **({"harness": GIVEN_ROWS if data else facts.harness} if harness else {}),
    }


def _known(kind: str, name: str, table: dict[str, Any]) -> Any:
    if name in table:
        return table[name]
    folded = {known.lower(): known for known in table}
    near = get_close_matches(name.lower(), folded, n=1)
    hint = f"did you mean {folded[near[0]]!r}?" if near else f"there are {', '.join(table)}"
    raise ScaloraError(f"no {kind} {name!r}; {hint}")


def _files(folder: Path, train: str, test: str) -> dict[str, Any]:
    return {"folder": str(folder), "train": train, "test": test}


def _hub(source: str, test_split: str) -> dict[str, Any]:
    return {"train": source, "test": source, "test_split": test_split}


def _sizes(train: int | None, validation: int | None, test: int | None) -> dict[str, Any]:
    sizes = {"train_size": train, "validation_size": validation, "test_size": test}
    return {name: size for name, size in sizes.items() if size is not None}
