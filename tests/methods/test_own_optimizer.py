"""Methods that bring an optimizer: the rest as Trainer would train it, state that resumes bitwise, one refusal."""

import copy

import pytest
import torch
from transformers import Trainer, get_linear_schedule_with_warmup

from helpers import models, training
from scalora import ScaloraError
from scalora.methods.support.own_optimizer import OwnOptimizer

NAMES = ["apollo-mini", "fira", "flora", "loft", "lora-muon", "lora-pro", "lora-rite"]


def _made(name, folder, **options):
    """A small BERT whose norms are trained too, and the optimizer."""
    adapted = training.adapt(name, "bert", folder / "base")
    for n, p in adapted.model.named_parameters():
        if "LayerNorm" in n:
            p.requires_grad_(True)
    settings = {"learning_rate": 0.01, "max_grad_norm": 0, "adam_beta2": 0.9, "weight_decay": 0.1, **options}
    made = training.trainer(adapted, "bert", folder / "out", **settings)
    optimizer = made.optimizer
    assert isinstance(optimizer, OwnOptimizer)
    return adapted.model, optimizer, made.args


def _give(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = 0.01 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_is_trained_as_trainer_would(name, tmp_path):
    model, optimizer, arguments = _made(name, tmp_path, optim="adamw_torch")
    own = {id(p) for group in optimizer.param_groups if group["own"] for p in group["params"]}
    rest = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    assert any("classifier" in n for n in rest)
    assert any("LayerNorm" in n for n in rest)
    plain = copy.deepcopy(model)
    reference = Trainer(plain, arguments).create_optimizer()
    schedules = [get_linear_schedule_with_warmup(each, 2, 6) for each in (optimizer, reference)]
    for step in range(5):
        for each in (model, plain):
            _give(each, step)
        for each in (optimizer, reference, *schedules):
            each.step()
    ours, theirs = (dict(each.named_parameters()) for each in (model, plain))
    for n in rest:
        torch.testing.assert_close(ours[n], theirs[n], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_goes_on_bitwise(name, tmp_path):
    model, optimizer, _ = _made(name, tmp_path)
    for step in range(3):
        _give(model, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other, resumed, _ = _made(name, tmp_path, learning_rate=0.5, weight_decay=0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        for each, each_optimizer in ((model, optimizer), (other, resumed)):
            _give(each, step)
            each_optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["fira", "lora-pro"])
def test_a_closure_is_run_with_gradients(name, tmp_path):
    model, optimizer, _ = _made(name, tmp_path, max_grad_norm=1)

    def closure():
        optimizer.zero_grad()
        loss = model(**models.batch("bert")).loss
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("field", "value"), [("optim", "adafactor"), ("optim_args", "momentum=0.1")])
def test_another_optimizer_is_refused_by_name(name, field, value, tmp_path):
    with pytest.raises(ScaloraError, match=rf"training\.{field} is '{value}'.*leave it out"):
        _made(name, tmp_path, **{field: value})
