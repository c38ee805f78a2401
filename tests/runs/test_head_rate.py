"""A classification head with a learning rate of its own."""

import pytest
import torch
from safetensors.torch import load_file

from helpers import tokenized, workspace
from scalora.common.errors import ScaloraError
from scalora.methods import MethodSpec, build_method
from scalora.runs.recipe import load_recipe
from scalora.runs.training import set_head_rate, train


@pytest.mark.parametrize("name", ["lora", "full", "mora", "hira"])
def test_the_head_alone_moves_to_groups_of_its_own(name):
    model = build_method(MethodSpec(name=name, rank=2)).adapt(tokenized.bert(), "sequence-classification").model
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = [p for n, p in named.items() if n.endswith("weight")]
    rest = [p for n, p in named.items() if not n.endswith("weight")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )
    set_head_rate(optimizer, model, ["classifier"], 3e-4)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert all(group["params"] for group in optimizer.param_groups)
    for n, p in named.items():
        lr = 3e-4 if "classifier" in n else 1e-2
        assert found[id(p)] == (lr, 0.1 if n.endswith("weight") else 0.0), n
    assert any("classifier" in n for n in named)


def test_a_run_trains_the_head_at_its_own_rate(tmp_path):
    workspace.lay(tmp_path)
    still = [*workspace.classification(tmp_path), "method.name=lora", "method.options={}", "training.max_steps=2"]
    heads = {}
    for rate in ("1e-9", "1e-2", "null"):
        overrides = [*still, f"head_learning_rate={rate}", f"output={tmp_path / rate}"]
        train(load_recipe(tmp_path / "recipe.yaml", overrides))
        tensors = load_file(tmp_path / rate / "adapter" / "adapter_model.safetensors")
        heads[rate] = next(value for key, value in tensors.items() if key.endswith("classifier.weight"))
    assert torch.equal(heads["1e-2"], heads["null"])  # what training.learning_rate is
    moved = (heads["1e-2"] - heads["1e-9"]).abs().max()
    assert moved > 5e-3


def test_a_model_without_a_head_refuses_a_rate_for_it(tmp_path):
    recipe = load_recipe(workspace.lay(tmp_path), ["head_learning_rate=1e-3"])
    with pytest.raises(ScaloraError, match="head_learning_rate is 0"):
        train(recipe)
    assert not (tmp_path / "run").exists()
