"""An event changes the store, A, B and the optimizer's state as one, or the model says that it has not."""

import signal

import pytest
import torch

import scalora
from helpers import models
from scalora import ScaLoraConfig, ScaloraError
from scalora.engine.stores.adapter import AdapterStore

STORES = ("adapter", "base")
CONFIGS = {"event": {"interval": 1}, "refresh": {"interval": None, "refresh": 2}}


def attached(accumulate, **config):
    model = models.lora("llama", r=2)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = scalora.attach(model, optimizer, ScaLoraConfig(accumulate=accumulate, **config))
    models.train(model, optimizer, "llama", 2)
    return model, optimizer, handle


def backward(model, seed=2):
    model(**models.batch("llama", seed)).loss.backward()


def interrupted(monkeypatch, error, what):
    """The next event stops in the middle: the store has received, A and B are as they were."""
    name = "torch._foreach_mul_" if what == "event" else "scalora.engine.refresh.refresh.Refresh._replace"

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(name, stop)


@pytest.mark.parametrize("accumulate", STORES)
@pytest.mark.parametrize("what", CONFIGS)
def test_after_an_error_half_way_nobody_computes_until_a_state_is_loaded(accumulate, what, monkeypatch, tmp_path):
    model, optimizer, handle = attached(accumulate, **CONFIGS[what])
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept, of_handle, expected = optimizer.state_dict(), handle.state_dict(), models.logits(model, "llama")
    backward(model)
    with monkeypatch.context() as patch:
        interrupted(patch, torch.OutOfMemoryError("none left"), what)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    optimizer.zero_grad()
    for act in (
        lambda: backward(model),
        lambda: models.logits(model, "llama"),
        model.state_dict,
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: scalora.save_plain_lora(model, tmp_path / "plain"),
        lambda: model.merge_adapter(),
    ):
        with pytest.raises(ScaloraError, match=r"stopped an event of ScaLoRA half-way|accumulate='base' has added"):
            act()
    model.load_state_dict(saved)
    optimizer.load_state_dict(kept)
    handle.load_state_dict(of_handle)
    torch.testing.assert_close(models.logits(model, "llama"), expected, rtol=0, atol=1e-5)
    models.train(model, optimizer, "llama", 2, start=2)


def test_a_written_base_is_whole_again_with_its_weights_only(monkeypatch):
    model, optimizer, _ = attached("base", interval=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" not in name}
    backward(model)
    with monkeypatch.context() as patch:
        interrupted(patch, MemoryError(), "event")
        with pytest.raises(MemoryError):
            optimizer.step()
    with pytest.raises(ScaloraError):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("accumulate", STORES)
def test_a_ctrl_c_waits_for_the_end_of_an_event(accumulate, monkeypatch):
    model, _, handle = attached(accumulate, interval=1)
    inner, expected = torch._foreach_mul_, models.logits(model, "llama")
    handler = signal.getsignal(signal.SIGINT)  # the command line's, where its tests ran in this process before

    def interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)
        inner(*arguments)

    backward(model)
    with monkeypatch.context() as patch:
        patch.setattr("torch._foreach_mul_", interrupt)
        with pytest.raises(KeyboardInterrupt):
            handle.rescale()
    torch.testing.assert_close(models.logits(model, "llama"), expected, rtol=0, atol=1e-5)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("accumulate", STORES)
def test_interrupted_in_the_optimizers_own_part_of_a_step_the_model_can_be_saved(accumulate, monkeypatch, tmp_path):
    model, optimizer, _ = attached(accumulate, interval=1)
    backward(model)

    def after_ours(*_):
        for p in models.trainable(model)[:3]:  # some of them are written
            p.data.add_(0.01)
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(after_ours)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hook.remove()
    logits = models.logits(model, "llama")
    assert torch.isfinite(logits).all()
    model.state_dict()
    if accumulate == "adapter":
        model.save_pretrained(tmp_path / "out")


def test_a_signal_that_is_ignored_stays_so():
    model, optimizer, _ = attached("adapter", interval=1)
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # not callable: nothing to wait for
    try:
        models.train(model, optimizer, "llama", 1, start=2)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_recompression_that_fails_is_noticed(monkeypatch):
    model, optimizer, handle = attached("adapter", interval=1)
    start = 2
    while handle.store.free > 0:
        models.train(model, optimizer, "llama", 1, start=start)
        start += 1

    def fail(self):
        raise MemoryError

    monkeypatch.setattr(AdapterStore, "recompress", fail)
    with pytest.raises(MemoryError):
        models.train(model, optimizer, "llama", 1, start=start)
    with pytest.raises(ScaloraError, match="half-way"):
        models.logits(model, "llama")
