"""The recipe lines of docs/methods.md for ``peft:<TYPE>``, as they stand: trained, merged, saved and loaded."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from helpers import models, training

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
LINES = re.findall(r"^method: \{name: \"peft:.*\}$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_types_that_were_asked_for_have_a_line():
    types = [yaml.safe_load(line)["method"]["name"].removeprefix("peft:") for line in LINES]
    assert types == ["GRALORA", "RANDLORA", "SHIRA", "MISS", "DELORA"]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("line", LINES)
def test_a_line_trains_merges_saves_and_loads(line, kind, tmp_path):
    fields = yaml.safe_load(line)["method"]
    before = models.logits(training.base(kind, tmp_path / "base"), kind)
    adapted = training.adapt(fields.pop("name"), kind, tmp_path / "base", **fields)
    if kind == "llama":  # bert's head starts at random
        torch.testing.assert_close(models.logits(adapted.model, kind), before, rtol=0, atol=1e-5)
    made = training.trainer(adapted, kind, tmp_path / "out", learning_rate=2e-3)
    made.train()
    losses = training.losses(made)
    assert losses[-1] < losses[0]
    after = models.logits(adapted.model, kind)
    assert len(dict(adapted.spectra())) == {"llama": 8, "bert": 6}[kind]
    loaded = training.run_lines(adapted.save(tmp_path / "adapter"))
    torch.testing.assert_close(models.logits(loaded, kind), after, rtol=0, atol=1e-5)
    torch.testing.assert_close(models.logits(loaded.merge_and_unload(), kind), after, rtol=0, atol=1e-5)
