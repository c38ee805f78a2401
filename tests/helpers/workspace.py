"""A small model in a folder and small data in files: ground for whole runs, without any network."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import yaml

from helpers import tokenized
from scalora.runs import training


def lay(folder: Path) -> Path:
    """Write tiny models and data into ``folder``; the path of a recipe that uses them."""
    for name, model in (("llama", tokenized.llama()), ("bert", tokenized.bert())):
        model.save_pretrained(folder / name)
        tokenized.tokenizer().save_pretrained(folder / name)
    words = ["cat", "dog", "sky", "mat"]
    rows = [
        {"text": f"the {words[i % 4]} {'abcdefgh'[i % 8]}", "label": int(words[i % 4] in ("sky", "mat")), "id": i}
        for i in range(60)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(folder / "llama"),
        "precision": "float32",  # the same on every machine
        "task": {
            "kind": "multiple_choice",
            # The id makes rows distinct: repeated rows are never split over train and test.
            "data": {"train": str(folder / "data.jsonl"), "test_size": 20, "columns": {"id": "id"}},
            "prompt": "{text}",
            "choices": [" no", " yes"],
            "answer": "label",
        },
        "method": {"name": "scalora-i", "rank": 2, "options": {"interval": 2}},
        "training": {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_steps": 4,
        },
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Within, a run receives Ctrl-C at the end of this step."""

    class Stop(training.StopOnSignal):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                self._receive(signal.SIGINT, None)
            super().on_step_end(args, state, control, **kwargs)

    with patch.object(training, "StopOnSignal", Stop):
        yield


CLASSIFICATION = [
    "task={kind: classification, text: '{text}', label: label, data: {train: %s, test_size: 20, columns: {id: id}}}"
]


def classification(folder: Path) -> list[str]:
    """Overrides that make the recipe classify with the tiny BERT."""
    return [CLASSIFICATION[0] % (folder / "data.jsonl"), f"model={folder / 'bert'}"]
