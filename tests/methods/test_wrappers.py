"""Saved layers of our own: what is wrong with a folder is said."""

import json

import pytest
import torch

from helpers import models, training
from scalora import ScaloraError, load


@pytest.fixture
def saved(tmp_path):
    adapted = training.adapt("mora", "llama", tmp_path / "base")
    adapted.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_incomplete_folder(saved):
    (saved / "adapter.json").unlink()
    with pytest.raises(ScaloraError, match=r"holds no .*adapter\.json"):
        load(saved)


def test_another_base_model(saved, tmp_path):
    about = json.loads((saved / "adapter.json").read_text())
    about["modules"].append("model.layers.7.self_attn.q_proj")
    (saved / "adapter.json").write_text(json.dumps(about))
    with pytest.raises(ScaloraError, match="does not fit the base model"):
        load(saved)


def test_a_base_that_has_moved(saved, tmp_path):
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    model = load(saved, base=str(tmp_path / "elsewhere"))
    assert models.logits(model, "llama").isfinite().all()


def test_saving_twice_replaces(tmp_path):
    adapted = training.adapt("mora", "llama", tmp_path / "base")
    adapted.save(tmp_path / "adapter")
    with torch.no_grad():
        for param in adapted.model.parameters():
            if param.requires_grad:
                param.fill_(0.01)
    loaded = training.run_lines(adapted.save(tmp_path / "adapter"))
    assert torch.equal(models.logits(loaded, "llama"), models.logits(adapted.model, "llama"))
