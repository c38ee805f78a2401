"""What BatchNorm gathers is in no adapter: a run leaves it as the base has it, so that what is saved is what scored."""

import copy

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

import scalora
from helpers import images, workspace
from scalora.models.running_statistics import hold_statistics
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train
from scalora.tasks import build_task


def _resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**sizes))


@pytest.mark.parametrize("method", ["scalora-i", "peft:LOHA"])
def test_what_is_saved_is_what_was_scored(tmp_path, method):
    path = workspace.lay(tmp_path)
    _resnet().save_pretrained(tmp_path / "resnet")
    processor = images.processor()
    processor.save_pretrained(tmp_path / "resnet")
    data = f"{{train: {images.lay(tmp_path / 'photos')}, test_size: 20}}"
    recipe = load_recipe(path, [
        f"model={tmp_path / 'resnet'}", f"task={{kind: image_classification, data: {data}}}",
        f"method={{name: '{method}', rank: 2, target_modules: [convolution]}}", "training.max_steps=4",
    ])  # fmt: skip
    result = train(recipe, ranks=False)
    assert result.before is not None
    assert result.after.metrics["nll"] < result.before.metrics["nll"]
    again = build_task(recipe.task).score(scalora.load(result.folder), processor)
    assert again.metrics == pytest.approx(result.after.metrics, rel=1e-5)


def test_a_head_that_is_saved_whole_gathers_its_own():
    model = torch.nn.ModuleDict({"base": torch.nn.BatchNorm1d(2), "head": torch.nn.BatchNorm1d(2)})
    hold_statistics(model, ["head"])
    model = copy.deepcopy(model).train()
    for layer in model.values():
        layer(torch.randn(8, 2) + 5)
    moved = {name: bool(buffer.any()) for name, buffer in model.named_buffers() if name.endswith("running_mean")}
    assert moved == {"base.running_mean": False, "head.running_mean": True}
    assert model["head"].training
