"""Copies and averages of a model that accumulates: their function is right, or a message says no."""

import copy
import pickle

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import scalora
from helpers.zoo import KINDS, adamw, same
from scalora import ScaLoraConfig, ScaloraError

pytestmark = pytest.mark.filterwarnings("ignore")
SOME = ["llama", "gpt2", "attention", "names alike", "token indices"]
some_kinds = pytest.mark.parametrize("kind", SOME)

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@some_kinds
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_the_model_and_lives_for_itself(kind, way):
    kind = KINDS[kind]
    model, optimizer, _ = kind.trained()
    expected = kind.output(model)
    twin = COPIES[way](model)
    kind.step(model, optimizer)
    same(kind.output(twin), expected)
    same(kind.output(twin.double() if "input_ids" in kind.inputs else twin).float(), expected)
    twin = COPIES[way](model)
    expected = kind.output(model)
    its = adamw(twin)
    scalora.attach(twin, its, ScaLoraConfig(interval=1, capacity=30))  # with more room than it came with
    same(kind.output(twin), expected)
    for _ in range(3):
        kind.step(twin, its)
    assert not torch.equal(kind.output(twin), expected)
    same(kind.output(model), expected)


def test_optimizer_and_handle_are_not_copied():
    model, optimizer, handle = KINDS["llama"].trained()
    for together in ((model, optimizer), (model, handle), optimizer, handle):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(ScaloraError, match="cannot be copied or pickled"):
                copied(together)
    handle.detach()
    copy.deepcopy((model, optimizer))


def test_the_steps_of_a_handle_that_lost_its_layers_are_refused():
    model, optimizer, _ = KINDS["llama"].trained()
    second = adamw(model)
    with pytest.warns(UserWarning, match="takes over these adapters"):
        scalora.attach(model, second)
    expected = KINDS["llama"].output(model)
    with pytest.raises(ScaloraError, match="superseded"):
        KINDS["llama"].step(model, optimizer)
    same(KINDS["llama"].output(model), expected)
    KINDS["llama"].step(model, second)


def test_a_handle_that_takes_over_from_a_white_one_looks_by_itself():
    model, _, handle = KINDS["llama"].trained(interval=None, coordinates="white")
    second = adamw(model)
    with pytest.warns(UserWarning, match="takes over these adapters"):
        successor = scalora.attach(model, second, handle.config)
    KINDS["llama"].step(model, second)
    assert successor.white.moments.looks == 1


# Averages.


def _swa(model):
    return AveragedModel(model)


def _ema(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)


def _update(average, model):
    average.update_parameters(model)


def _lerp(average, model):
    with torch.no_grad():
        for mine, its in zip(average.parameters(), model.parameters(), strict=False):
            mine.lerp_(its, 0.5)


def _data(average, model):
    for mine, its in zip(average.parameters(), model.parameters(), strict=False):
        mine.data.mul_(0.5).add_(its.data, alpha=0.5)


def _by_name(average, model):
    with torch.no_grad():
        its = dict(model.named_parameters())
        for name, mine in average.named_parameters():
            if mine.requires_grad:
                mine.copy_(0.5 * mine + 0.5 * its[name])


AVERAGES = {
    "AveragedModel": (_swa, _update),
    "AveragedModel, ema": (_ema, _update),
    "lerp_": (copy.deepcopy, _lerp),
    "data": (copy.deepcopy, _data),
    "by name": (copy.deepcopy, _by_name),
}


# A copy of before attach is not ours: what is averaged into it by name, its own names only, nobody sees.
@pytest.mark.parametrize(
    ("when", "way"),
    [
        (w, a)
        for w in ("before attach", "after attach", "after events")
        for a in AVERAGES
        if (w, a) != ("before attach", "by name")
    ],
)
@pytest.mark.parametrize("kind", ["llama", "names alike"])
def test_an_average_over_events_is_refused(kind, way, when):
    """A mean of factors of before and after an event is no mean of anything."""
    kind, (make, update) = KINDS[kind], AVERAGES[way]
    model = kind.adapted()
    optimizer = adamw(model)
    average = make(model) if when == "before attach" else None
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    average = make(model) if when == "after attach" else average

    def live():
        nonlocal average
        for step in range(5):
            kind.step(model, optimizer)
            if step == 2 and average is None:
                average = make(model)
            if average is not None:
                update(average, model)
        kind.output(average)

    with pytest.raises((ScaloraError, RuntimeError, ValueError, KeyError)) as refusal:
        live()
    if when != "before attach":  # a copy of what was not ours yet is torch's
        assert refusal.type is ScaloraError
        assert "average" in str(refusal.value)
    assert kind.output(model).isfinite().all()


def test_a_written_average_stays_refused():
    """Copied, cast, merged or saved: nobody forgets that it was written to."""
    kind = KINDS["llama"]
    model, optimizer, _ = kind.trained()
    average = copy.deepcopy(model)
    kind.step(model, optimizer)
    _data(average, model)
    for use in (
        copy.deepcopy(average).state_dict, copy.deepcopy(average).bfloat16, copy.deepcopy(average).merge_and_unload,
        lambda: kind.output(copy.deepcopy(average)), lambda: average.save_pretrained("nowhere"),
    ):  # fmt: skip
        with pytest.raises(ScaloraError, match="average"):
            use()
    average.load_state_dict(model.state_dict())
    same(kind.output(average), kind.output(model))


def test_the_mean_of_state_dicts_of_different_columns_is_refused():
    kind = KINDS["llama"]
    model, optimizer, _ = kind.trained()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind.step(model, optimizer)
    with pytest.raises(RuntimeError, match="must match"):
        {name: (first[name] + tensor) / 2 for name, tensor in model.state_dict().items()}


# The function of other people's parameters.


@some_kinds
@pytest.mark.parametrize("given", ["state_dict", "named_parameters"])
def test_functional_call_computes_the_whole_function(kind, given):
    kind = KINDS[kind]
    model, _, _ = kind.trained()
    expected = kind.output(model)
    tied = getattr(getattr(model.get_base_model(), "config", None), "tie_word_embeddings", False)
    if given == "state_dict" and tied:
        pytest.skip("torch itself refuses two names of one weight")
    weights = model.state_dict() if given == "state_dict" else dict(model.named_parameters())
    arguments = (tuple(kind.inputs.values()), {}) if "x" in kind.inputs else ((), kind.inputs)
    with torch.no_grad():
        out = functional_call(model, weights, *arguments)
    same(out if isinstance(out, torch.Tensor) else out.logits, expected)
    same(kind.output(model), expected)


# Kernels that read the matrices past the layer, and hooks of accelerate's.


class Fused(nn.Module):
    """As Unsloth's: the parent computes with the matrices of its children and never calls them."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.fused = nn.Linear(8, 8), False

    def forward(self, x):
        if not self.fused:
            return self.q_proj(x)
        layer = self.q_proj
        adapter = layer.active_adapters[0]
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return layer.base_layer(x) + x @ A.T @ B.T * layer.scaling[adapter]


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_a_kernel_that_passes_the_layer_by_is_refused_at_the_first_event(accumulate):
    kind = copy.copy(KINDS["names alike"])
    kind.make, kind.lora = (lambda: nn.Sequential(Fused(), nn.Linear(8, 4))), {"target_modules": ["q_proj", "1"]}
    x = torch.randn(5, 8)
    model = kind.adapted()
    model.base_model.model[0].fused = True
    optimizer = adamw(model)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1, accumulate=accumulate))
    model(x).square().mean().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ScaloraError, match=r"q_proj: .* without its own forward pass"):
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.base_model.model[0].fused = False
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_hooks(when):
    kind = KINDS["llama"]
    model = kind.adapted()
    if when == "before":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    optimizer = adamw(model)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    for _ in range(4):
        kind.step(model, optimizer)
    expected = kind.output(model)
    if when == "after":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    same(kind.output(model), expected)
    kind.step(model, optimizer)
    assert not torch.equal(kind.output(model), expected)
    expected = kind.output(model)
    same(kind.output(model.merge_and_unload()), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_copies_of_data_parallel_are_refused(kind):
    kind = KINDS[kind]
    _, _, handle = kind.trained()
    module = handle.layers[0].module

    def replica():
        copied = module._replicate_for_data_parallel()
        for name, child in module.named_modules():  # as torch.nn.parallel.replicate puts its copies together
            if name and "." not in name:
                copied._modules[name] = child
        return copied

    x = torch.zeros(1, 3, handle.layers[0].shape[1])
    with pytest.raises(ScaloraError, match=r"nn.DataParallel.*torchrun.*CUDA_VISIBLE_DEVICES=0"):
        replica()(x)
    with torch.no_grad():
        assert torch.equal(replica()(x), module(x))
    handle.detach()
    assert torch.equal(replica()(x), module(x))
