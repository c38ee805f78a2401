"""What users take away: a plain LoRA adapter, loaded in a process that has never heard of scalora."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import scalora
from helpers import models
from scalora.engine.plain_lora import Truncation, joined_factors

KINDS = ("llama", "bert", "gpt2")
CODE = """
import sys, torch
sys.modules["scalora"] = None  # any import of it would fail
tests, folder, *kinds = sys.argv[1:]
sys.path.insert(0, tests)
from helpers import models
from peft import PeftModel
for kind in kinds:
    model = PeftModel.from_pretrained(models.base(kind), f"{folder}/{kind}")
    torch.save(models.logits(model, kind), f"{folder}/{kind}.pt")
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Per kind, what a trained model computes, and what one fresh process computes with the saved adapters."""
    folder = tmp_path_factory.mktemp("fresh")
    ours = {}
    for kind in KINDS:
        model = models.lora(kind, r=3, rank_pattern={"value|v_proj|c_attn": 2})
        optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
        scalora.attach(model, optimizer, scalora.ScaLoraConfig(interval=1))
        models.train(model, optimizer, kind, 9)
        scalora.save_plain_lora(model, folder / kind)
        ours[kind] = models.logits(model, kind)
    assert {path.name for path in folder.iterdir()} == set(KINDS)  # nothing temporary is left
    subprocess.run([sys.executable, "-c", CODE, Path(models.__file__).parents[1], folder, *KINDS], check=True)
    return {kind: (ours[kind], torch.load(folder / f"{kind}.pt")) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_reproduces_the_logits_in_a_fresh_process(fresh, kind):
    ours, theirs = fresh[kind]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_an_adapter_is_replaced_as_a_whole_and_unused_columns_are_left_out(tmp_path):
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, scalora.ScaLoraConfig(interval=1))
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "stale"):
        (tmp_path / "adapter" / name).write_text("{}")
    models.train(model, optimizer, "llama", 3)  # the first event moves nothing, two more move r columns each
    scalora.save_plain_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "stale").exists()
    assert joined_factors(handle.layers[0])[0].shape[1] == 3 * 4


def test_plain_lora_is_saved_as_it_is(tmp_path):
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    models.train(model, optimizer, "llama", 2)
    scalora.save_plain_lora(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(models.base("llama"), tmp_path / "adapter")
    torch.testing.assert_close(models.logits(again, "llama"), models.logits(model, "llama"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_truncated_adapter_loads_in_plain_peft(tmp_path, kind):
    model = models.lora(kind)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, scalora.ScaLoraConfig(interval=1))
    models.train(model, optimizer, kind, 4)
    truncation = Truncation(rank=5)
    scalora.save_plain_lora(model, tmp_path / "adapter", truncation)
    for layer in handle.layers:  # what the loaded adapter must compute: the dense best approximation
        P, Q = joined_factors(layer)
        U, sigma, Vt = torch.linalg.svd(P @ Q.mT)
        best = U[:, :5] * sigma[:5] @ Vt[:5] - P @ Q.mT
        with torch.no_grad():
            layer.base_weight.add_(best)
        share = 1 - sigma[5:].square().sum() / sigma.square().sum()
        assert truncation.kept[layer.name].energy == pytest.approx(float(share), abs=1e-5)
    again = PeftModel.from_pretrained(models.base(kind), tmp_path / "adapter")
    torch.testing.assert_close(models.logits(again, kind), models.logits(model, kind), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 2, "energy": 0.9}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.0}, {"energy": float("nan")}]
)
def test_a_truncation_needs_one_sensible_aim(options):
    with pytest.raises(scalora.ScaloraError, match=r"^(rank|energy) is"):
        Truncation(**options)


def test_an_update_of_nothing_is_truncated_to_nothing(tmp_path):
    model = models.lora("llama")
    for aim in ({"rank": 2}, {"energy": 0.9}):
        scalora.save_plain_lora(model, tmp_path / "adapter", Truncation(**aim))
        again = PeftModel.from_pretrained(models.base("llama"), tmp_path / "adapter")
        assert torch.equal(models.logits(again, "llama"), models.logits(models.base("llama"), "llama"))


def test_a_truncation_does_not_hide_that_the_base_was_rewritten(tmp_path):
    model = models.lora("llama", init_lora_weights="pissa")
    for factors in (joined_factors, Truncation(rank=2)):
        with pytest.raises(scalora.ScaloraError, match="has changed the base weights"):
            scalora.save_plain_lora(model, tmp_path / "adapter", factors)


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_is_no_adapter_is_not_replaced(tmp_path, what):
    path, mine = tmp_path / "mine", tmp_path / "mine" / "thesis.txt"
    if what == "file":
        path.write_text("thesis")
    else:
        target = tmp_path / "target" if what == "link" else path
        target.mkdir()
        (target / "thesis.txt").write_text("thesis")
        if what == "link":
            path.symlink_to(target)
    with pytest.raises(scalora.ScaloraError, match="will not be replaced: name another"):
        scalora.save_plain_lora(models.lora("llama"), path)
    assert (path if what == "file" else mine).read_text() == "thesis"


def test_an_adapter_of_which_a_part_is_in_the_base_is_not_saved(tmp_path):
    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    scalora.attach(model, optimizer, scalora.ScaLoraConfig(interval=1, accumulate="base"))
    models.train(model, optimizer, "llama", 3)
    with pytest.raises(scalora.ScaloraError, match="accumulate='base' has added"):
        scalora.save_plain_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("order", [("reference", "policy"), ("policy", "reference")])
def test_beside_a_reference_the_trained_model_is_saved(order, tmp_path):
    pair = {"reference": models.lora("llama").requires_grad_(False), "policy": models.lora("llama")}
    both, policy = torch.nn.ModuleDict({name: pair[name] for name in order}), pair["policy"]
    optimizer = torch.optim.AdamW(models.trainable(both), lr=1e-2)
    scalora.attach(both, optimizer, {"interval": 2})
    models.train(policy, optimizer, "llama", 5)
    scalora.save_plain_lora(both, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(models.base("llama"), tmp_path / "plain")
    torch.testing.assert_close(models.logits(loaded, "llama"), models.logits(policy, "llama"), rtol=0, atol=1e-5)


def test_two_trained_models_are_no_one_adapter(tmp_path):
    towers = torch.nn.ModuleList([models.lora("llama"), models.lora("llama")])
    optimizer = torch.optim.AdamW(models.trainable(towers), lr=1e-2)
    scalora.attach(towers, optimizer, {"interval": 1})
    for tower in towers:
        tower(**models.batch("llama")).loss.backward()
    optimizer.step()
    with pytest.raises(scalora.ScaloraError, match="several PEFT models"):
        scalora.save_plain_lora(towers, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    for index, tower in enumerate(towers):
        scalora.save_plain_lora(tower, tmp_path / str(index))
