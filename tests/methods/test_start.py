"""What dense methods started from, kept out of memory: the spectrum of the update is that of the difference."""

import gc
from pathlib import Path

import pytest
import torch

from helpers import training
from scalora import ScaloraError
from scalora.layers.peft_lora import find_layers
from scalora.methods.support.start import Start


def test_the_spectrum_is_that_of_the_difference():
    W = torch.randn(6, 4)
    before = W.clone()
    start = Start(lambda: [("w", W)])
    start.keep()
    folder = Path(start.folder.name)
    W += torch.randn(6, 4)
    ((name, spectrum),) = start.spectra()
    assert (name, spectrum.m, spectrum.n) == ("w", 6, 4)
    torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(W - before))
    del start
    gc.collect()
    assert not folder.exists()


def test_without_a_start_there_is_no_update_to_measure():
    with pytest.raises(RuntimeError, match="remember"):
        list(Start(lambda: [("w", torch.zeros(2, 2))]).spectra())


def test_a_full_disk_is_one_message(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ScaloraError, match=r"TMPDIR is .*No space left"):
        Start(lambda: [("w", torch.zeros(2, 2))]).keep()


def test_the_base_store_s_update_is_what_base_and_adapter_gained(tmp_path):
    adapted = training.adapt("scalora", "llama", tmp_path / "base", options={"accumulate": "base"})
    start = {layer.name: layer.base_weight.clone() for layer in find_layers(adapted.model)}
    training.trainer(adapted, "llama", tmp_path / "out", learning_rate=5e-3).train()
    found = dict(adapted.spectra())
    for layer in find_layers(adapted.model):
        update = layer.base_weight - start[layer.name] + layer.scale * layer.A @ layer.Bt
        torch.testing.assert_close(found[layer.name].sigma, torch.linalg.svdvals(update.detach()), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["full", "scalora"])
def test_no_second_copy_of_the_weights_stays_in_memory(name, tmp_path):
    shape = tuple(training.base("llama", tmp_path / "base").model.layers[0].self_attn.q_proj.weight.shape)
    already = _alive(shape)
    adapted = training.adapt(
        name, "llama", tmp_path / "base", options={"accumulate": "base"} if name == "scalora" else {}
    )
    mine = sum(tuple(p.shape) == shape for p in adapted.model.parameters())
    assert mine
    assert _alive(shape) <= already + mine


def _alive(shape):
    gc.collect()
    return sum(isinstance(o, torch.Tensor) and tuple(o.shape) == shape for o in gc.get_objects())
