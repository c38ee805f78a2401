"""Float32 adapters on a base in half precision, without autocast: PEFT's numbers, in no more operations than PEFT's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear
from torch import nn

from helpers.operations import Operations
from scalora.layers.accumulated import Accumulated
from scalora.layers.lora_forward import fuse_lora
from scalora.layers.stand_in import stand_in

M, N, TOKENS = 48, 40, 30
HALF = [torch.bfloat16, torch.float16]


def layer(dtype, columns=None, device="cpu", **options):
    """PEFT's layer; ours with so many accumulated columns where `columns` is given."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(N, M)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **options))
    module = model.base_model.model[0]
    nn.init.normal_(module.lora_B["default"].weight)
    model.to(device)
    assert module.lora_A["default"].weight.dtype == torch.float32
    if columns is None:
        return module
    held = Accumulated(M, N, 8, module.lora_A["default"].weight)
    nn.init.normal_(held.P)
    nn.init.normal_(held.Qt)
    held.used = columns
    stand_in(module).accumulated["default"] = held
    return module


def inputs(dtype, device="cpu"):
    torch.manual_seed(1)
    return torch.randn(2, TOKENS // 2, N).to(device, dtype).requires_grad_()


def definition(module, x, dtype):
    """The sum of all columns in another dtype, before it is rounded, from what the base layer gives."""
    A, B = (part["default"].weight.to(dtype) for part in (module.lora_A, module.lora_B))
    P, Qt = (part.to(dtype) for part in module.held("default").live()) if module.held("default") else (A[:, :0].T,) * 2
    base, x = module.base_layer(x).to(dtype), x.to(dtype)
    update = x @ A.mT @ B.mT + (x @ Qt.mT @ P.mT if len(Qt) else 0)
    return base + module.scaling["default"] * update


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("columns", [0, 8])
def test_the_sum_is_rounded_once(dtype, columns):
    module, x = layer(dtype, columns), inputs(dtype)
    out, exact = module(x), definition(module, x, torch.float64)
    assert out.dtype == dtype
    half_a_unit = torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((out.double() - exact).abs() <= 1.001 * half_a_unit + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("columns", [0, 8])
def test_gradients_are_those_of_autograd(dtype, columns):
    module, x = layer(dtype, columns), inputs(dtype)
    leaves = [x, module.lora_A["default"].weight, module.lora_B["default"].weight]
    weights = torch.randn(2, TOKENS // 2, M).to(dtype)
    found = torch.autograd.grad((module(x) * weights).sum(), leaves)
    wanted = torch.autograd.grad((definition(module, x, torch.float32) * weights.float()).sum(), leaves)
    assert [g.dtype for g in found] == [dtype, torch.float32, torch.float32]
    for g, theirs, close in zip(found, wanted, (2 * torch.finfo(dtype).eps, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(g.float(), theirs.float(), rtol=close, atol=close * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", HALF)
def test_without_accumulated_columns_it_is_pefts_pass(dtype):
    peft, ours, x = layer(dtype), layer(dtype, 0), inputs(dtype)
    found, theirs = ours(x), peft(x)
    assert type(peft) is Linear
    unit = torch.finfo(dtype).eps * theirs.abs()
    assert ((found - theirs).abs() <= unit).all()
    assert (found == theirs).float().mean() > 0.99  # float32 rounds a tie the other way, now and then


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_dora": True}])
def test_the_extraordinary_keeps_pefts_way(options, monkeypatch):
    module, calls, forward = layer(torch.bfloat16, **options), [], Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x, *a, **k: calls.append(1) or forward(self, x, *a, **k))
    fuse_lora(module)
    module.train()(inputs(torch.bfloat16))
    assert calls == [1]


def test_who_forbids_casting_hears_from_pefts_pass():
    module = layer(torch.bfloat16, 0)
    with disable_input_dtype_casting(module), pytest.raises(RuntimeError, match="dtype"):
        module(inputs(torch.bfloat16))


def _launches(module):
    """Of a forward and a backward pass, on a device that computes nothing."""
    x = inputs(torch.bfloat16, "meta")
    with Operations() as seen:
        module(x).backward(torch.empty(2, TOKENS // 2, M, dtype=torch.bfloat16, device="meta"))
    return seen.launches


@pytest.fixture
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # torch knows none for this device


@pytest.mark.parametrize("columns", [0, 8])
def test_accumulated_columns_cost_no_more_operations_than_pefts_detours(columns, no_autocast):
    base = layer(torch.bfloat16, device="meta").base_layer
    own, theirs = (_launches(layer(torch.bfloat16, k, "meta")) - _launches(base) for k in (columns, None))
    assert own <= theirs - (0 if columns else 4)
