"""Quantised optimizer states: read, rescaled and rounded once, beside the same states in float32.

Both libraries make their steps on CPUs; torchao compiles them, which is switched off here.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import scalora
from helpers import models
from helpers.attached import run
from helpers.twins import stepped, twins
from scalora import ScaLoraConfig
from scalora.engine.optimizers import carry_state, gradient_moments
from scalora.engine.quantised_state import quantised

# Class and options; whether it quantises.
OPTIMIZERS = {
    "bitsandbytes-AdamW8bit": ("AdamW8bit", {}, True),
    "bitsandbytes-AdamW": ("AdamW", {}, False),
    "bitsandbytes-PagedAdamW": ("PagedAdamW", {}, False),
    "bitsandbytes-PagedAdamW8bit": ("PagedAdamW8bit", {}, True),
    "bitsandbytes-AdEMAMix": ("AdEMAMix", {}, False),
    "bitsandbytes-AdEMAMix8bit": ("AdEMAMix8bit", {}, True),
    "bitsandbytes-Lion": ("Lion", {}, False),
    "bitsandbytes-Lion8bit": ("Lion8bit", {}, True),
    "bitsandbytes-SGD8bit": ("SGD8bit", {"momentum": 0.9}, True),
    "bitsandbytes-RMSprop8bit": ("RMSprop8bit", {}, True),
    "bitsandbytes-Adagrad8bit": ("Adagrad8bit", {}, True),
    "torchao-AdamW8bit": ("AdamW8bit", {}, True),
    "torchao-AdamW4bit": ("AdamW4bit", {}, True),
    "torchao-AdamWFp8": ("AdamWFp8", {}, True),
    "torchao-Adam8bit": ("Adam8bit", {}, True),
}
SIZES = (512, 384)  # at rank 16 more than the 4096 entries from which on both libraries quantise


@pytest.fixture(autouse=True)
def _eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def _maker(case):
    library, _, _ = case.partition("-")
    name, options, _ = OPTIMIZERS[case]
    cls = getattr(pytest.importorskip(f"{library}.optim"), name)
    return lambda params: cls(params, lr=0.01, **options)


def _rounding(state, key):
    """How far from a value of at most 1 the nearest code may be: half a gap, or from an end without a code."""
    qmap = state.get(f"qmap{key[-1]}") if "qmap1" in state else getattr(state[key], "qmap", None)
    if qmap is None:
        qmap = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0)
        qmap = qmap / qmap.max()
    qmap = qmap.sort().values
    low = -1.0 if qmap[0] < 0 else 0.0
    return max(float(qmap.diff().max()) / 2, float(qmap[0]) - low, 1 - float(qmap[-1]))


def _entries(optimizer, param):
    """Each entry in float32; where it is quantised, the size of its blocks and its rounding."""
    for key, value in optimizer.state[param].items():
        blocks = quantised(optimizer.state[param], key)
        if blocks:
            unit = _rounding(optimizer.state[param], key)
            yield from ((f"{key}.{i}", each.read(), (each.size, unit)) for i, each in enumerate(blocks))
        elif isinstance(value, torch.Tensor) and value.shape[-param.ndim :] == param.shape:
            yield key, value.clone(), None


def _factors():
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(16, generator=generator) + 0.5 for _ in range(2))


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_entry_is_rescaled_with_one_rounding(case):
    """Against the state before, in float32, times the factor: the nearest codes of each block, nothing else."""
    make, is_quantised = _maker(case), OPTIMIZERS[case][2]
    params = [nn.Parameter(torch.randn(SIZES[0], 16)), nn.Parameter(torch.randn(16, SIZES[1]))]
    optimizer = make(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    alpha, beta = _factors()
    before = [{key: value for key, value, _ in _entries(optimizer, p)} for p in params]
    carry_state(optimizer, params, [beta, alpha[:, None]])
    for p, factor, was in zip(params, (beta, alpha[:, None]), before, strict=True):
        found = list(_entries(optimizer, p))
        assert found
        assert any(blocks is not None for *_, blocks in found) == is_quantised
        for key, value, blocks in found:
            power = {"state2": 2, "exp_avg_sq": 2, "max_exp_avg_sq": 2}.get(key.partition(".")[0], 1)
            power = 2 if "RMS" in case or "Adagrad" in case else power
            exact = was[key] * factor**power
            if blocks is None:
                torch.testing.assert_close(value, exact, rtol=1e-6, atol=0)
            else:
                size, unit = blocks
                largest = exact.view(-1, size).abs().amax(1, keepdim=True)
                error = (value - exact).view(-1, size).abs() / largest
                assert 0 < float(error.max()) <= unit * 1.01  # bitsandbytes' search stops early


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_blocks_of_one_factor_are_not_rounded_at_all(case):
    """A layer that is left as it is keeps its state bitwise, and one factor for a block is its scale's."""
    make = _maker(case)
    params = [nn.Parameter(torch.randn(SIZES[0], 16)), nn.Parameter(torch.randn(16, 512))]
    optimizer = make(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = [{key: value for key, value, _ in _entries(optimizer, p)} for p in params]
    carry_state(optimizer, params, [torch.ones(16), torch.ones(16, 1)])
    for p, was in zip(params, before, strict=True):
        assert all(torch.equal(value, was[key]) for key, value, _ in _entries(optimizer, p))
    rows = torch.exp2(torch.arange(16.0) - 8)[:, None]  # each row is two blocks
    carry_state(optimizer, params, [torch.full((16,), 2.0), rows])
    for p, was, factor in zip(params, before, (torch.full((16,), 2.0), rows), strict=True):
        for key, value, _ in _entries(optimizer, p):
            squared = key.partition(".")[0] in ("state2", "exp_avg_sq", "max_exp_avg_sq")
            squared = squared or "RMS" in case or "Adagrad" in case
            assert torch.equal(value, was[key] * factor ** (2 if squared else 1))


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_means_of_gradients_are_turned_with_one_rounding(case):
    """What white coordinates and methods around the steps do; means of squares are not among them."""
    params = [nn.Parameter(torch.randn(SIZES[0], 16))]
    optimizer = _maker(case)(params)
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    was = {key: value for key, value, _ in _entries(optimizer, params[0])}
    turn = torch.linalg.qr(torch.randn(16, 16)).Q
    with gradient_moments(optimizer, params, 1) as ((*means,),):
        for mean in means:
            mean.copy_(mean @ turn)
    linear = {"state1", "exp_avg"} if not ("RMS" in case or "Adagrad" in case) else set()
    for key, value, blocks in _entries(optimizer, params[0]):
        if key.partition(".")[0] not in linear:
            assert torch.equal(value, was[key])
            continue
        exact = was[key] @ turn
        size, unit = blocks or (16, 1e-6)
        largest = exact.view(-1, size).abs().amax(1, keepdim=True)
        assert float(((value - exact).view(-1, size).abs() / largest).max()) <= unit * 1.01
    assert len(means) == sum(key.partition(".")[0] in linear for key in was) + ("AdEMAMix" in case and "8" not in case)


@pytest.mark.parametrize("case", ["bitsandbytes-AdamW8bit", "bitsandbytes-AdEMAMix8bit"])
def test_a_last_block_that_is_not_full(case):
    """torchao keeps such states in float32."""
    params = [nn.Parameter(torch.randn(300, 17))]
    optimizer = _maker(case)(params)
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    assert len(params[0].view(-1)) % 256
    was = {key: value for key, value, _ in _entries(optimizer, params[0])}
    carry_state(optimizer, params, [torch.full((17,), 2.0)])
    power = {"state2": 4.0}
    for key, value, blocks in _entries(optimizer, params[0]):
        assert blocks is not None
        assert torch.equal(value, was[key] * power.get(key.partition(".")[0], 2.0))


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_a_twin_that_saw_transformed_gradients(case):
    """Its states were rounded as often, and the carried ones once more: by less than the format's rounding on average.

    With one factor, a power of two, nothing is rounded once more: the two are bitwise one.
    """
    (carried, one), (transformed, other) = twins(_maker(case), *_factors(), sizes=SIZES, dtype=torch.float32)
    for p, q in zip(carried, transformed, strict=True):
        for (_, value, blocks), (_, twin, _) in zip(_entries(one, p), _entries(other, q), strict=True):
            if blocks is None:
                torch.testing.assert_close(value, twin, rtol=1e-4, atol=1e-7)
            else:
                size, unit = blocks
                largest = twin.view(-1, size).abs().amax(1, keepdim=True)
                assert float(((value - twin).view(-1, size).abs() / largest).mean()) < unit
    one_factor = torch.full((16,), 2.0), torch.full((16,), 0.5)
    for p, q in zip(*stepped(_maker(case), *one_factor, sizes=SIZES, dtype=torch.float32), strict=True):
        assert torch.equal(p, q)


WAYS = {"columns": {}, "refresh": {"refresh": 4}, "white": {"coordinates": "white"}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["bitsandbytes-AdamW8bit", "bitsandbytes-AdEMAMix8bit", "bitsandbytes-Lion8bit",
                                  "torchao-AdamW8bit", "torchao-AdamW4bit", "torchao-AdamWFp8"])  # fmt: skip
def test_no_event_changes_the_function(case, way):
    """Matrices of more than 4096 entries, so that the states of some are quantised."""
    library, _, _ = case.partition("-")
    make = getattr(pytest.importorskip(f"{library}.optim"), OPTIMIZERS[case][0])
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=models.VOCABULARY, **sizes))
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "up_proj", "down_proj"])
    model = get_peft_model(base, lora)
    optimizer = make(models.trainable(model), lr=1e-3)
    if way == "refresh":
        handle = scalora.attach(model, optimizer, ScaLoraConfig(interval=2, refresh=4))
        models.train(model, optimizer, "llama", 10)
        assert handle.refresh.steps == [4, 8]
    else:
        run(model, optimizer, steps=12, **WAYS[way])
    assert any(quantised(state, key) for state in optimizer.state.values() for key in state)


@pytest.mark.parametrize("case", ["bitsandbytes-AdamW8bit", "torchao-AdamW8bit"])
def test_relora_prunes_what_is_quantised(case):
    """A code of 0 is no zero: bitsandbytes decodes it to about −absmax."""
    from scalora.methods.relora import prune_state

    param = nn.Parameter(torch.randn(16, SIZES[0]))
    optimizer = _maker(case)([param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    before = {key: value for key, value, _ in _entries(optimizer, param)}
    prune_state(optimizer, param, "random", 0.9, torch.Generator().manual_seed(0))
    after = {key: value for key, value, _ in _entries(optimizer, param)}
    assert len(after) == 2
    for key, value in after.items():
        small = value.abs() <= 0.02 * before[key].abs().max()
        assert small.float().mean() > 0.85
        assert (value.abs() <= before[key].abs().max() * 1.02).all()
