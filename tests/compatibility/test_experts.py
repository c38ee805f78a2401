"""Experts stored as one parameter (``target_parameters``): each expert is rescaled by itself, exactly."""

import copy

import pytest
import torch
from peft import PeftModel

import scalora
from helpers import models
from helpers.attached import run
from helpers.experts import MIXTURES, base, lora, outputs, trained, wrappers
from scalora import ScaLoraConfig, ScaloraError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SKETCHED = {"refresh": {"refresh": 4}, "white": {"coordinates": "white"}}
READ_BY = {"eager": "eager", "batched": "batched_mm", "grouped": "grouped_mm"}


@pytest.mark.parametrize("case", MIXTURES)
def test_rescaled(case, tmp_path):
    model = lora(case)
    handle = run(model, steps=24)  # recompressed twice
    experts = [layer for layer in handle.layers if layer.experts > 1]
    assert [layer.module.parameter_name for layer in experts] == ["gate_up_proj", "down_proj"][::-1]
    for layer in experts:
        assert layer.experts == 4
        assert all(factors.shape == (4, 2) for factors in handle.factors[layer.name])
        assert layer.accumulated.used > 8
    expected = outputs(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(base(case)))
    scalora.save_plain_lora(model, tmp_path / "plain")
    model.save_pretrained(tmp_path / "pretrained")
    model.save_pretrained(tmp_path / "state", state_dict=model.state_dict())
    for folder in ("plain", "pretrained", "state"):
        again = PeftModel.from_pretrained(base(case), tmp_path / folder)
        assert min(module.r["default"] for module in wrappers(again)) > 2
        torch.testing.assert_close(outputs(again), expected, rtol=0, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", MIXTURES)
def test_rescaled_into_the_base(case):
    model = lora(case)
    handle = run(model, steps=12, accumulate="base")
    for layer in handle.layers:
        module = base(case).get_submodule(layer.name.removeprefix("base_model.model.").replace(".base_layer", ""))
        assert not torch.equal(layer.weight, getattr(module, getattr(layer.module, "parameter_name", "weight")))
    expected = outputs(model)
    with pytest.raises(ScaloraError, match="untouched base"), model.disable_adapter():
        pass
    torch.testing.assert_close(outputs(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["adapter", "base"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(case):
    model, optimizer, handle = trained("gpt-oss", 6, accumulate=case)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    models.train(model, optimizer, "llama", 6, start=6)
    resumed = lora("gpt-oss")
    scalora.prepare(resumed, handle.config)
    resumed.load_state_dict(saved[0])
    other = torch.optim.AdamW(models.trainable(resumed), lr=1e-2)
    other.load_state_dict(saved[1])
    scalora.attach(resumed, other, handle.config).load_state_dict(saved[2])
    models.train(resumed, other, "llama", 6, start=6)
    theirs = resumed.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", READ_BY)
def test_kernels_of_transformers_read_the_sum(case):
    """They take the parameter from the module, and so what was moved too."""
    model = lora("mixtral")
    model.set_experts_implementation(READ_BY[case])
    run(model)


def test_a_kernel_that_reads_the_matrices_past_the_layer_is_refused():
    """A stand-in for one: it forms the experts' weights by itself."""
    model, optimizer, _ = trained("mixtral", 2)
    wrapper = wrappers(model)[0]
    A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    (A.square().sum() + B.square().sum()).backward()
    optimizer.step()  # a loop may look one batch ahead
    optimizer.zero_grad()
    (A.square().sum() + B.square().sum()).backward()
    with pytest.raises(ScaloraError, match="without its own forward pass: a fused kernel"):
        optimizer.step()


@pytest.mark.parametrize("case", SKETCHED)
def test_sketches_do_not_see_what_experts_read(case):
    """Refused, or left."""
    model = lora("mixtral")
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    with pytest.raises(ScaloraError, match=r"experts adapts a bare parameter.*leave both out.*unsupported='leave'"):
        scalora.attach(model, optimizer, ScaLoraConfig(**SKETCHED[case]))
    handle = scalora.attach(model, optimizer, ScaLoraConfig(**SKETCHED[case], unsupported="leave"))
    models.train(model, optimizer, "llama", 9)
    assert len(handle.left) == 2
    assert [layer.name.split(".")[-1] for layer in handle.layers] == ["q_proj"]


@pytest.mark.parametrize("case", ["adapter", "base"])
def test_a_router_is_one_matrix(case):
    """PEFT asks its layer for the update in every pass."""
    model = lora("mixtral", target_parameters=["gate.weight"])
    handle = run(model, accumulate=case)
    assert {layer.experts for layer in handle.layers} == {1}
    expected = outputs(model)
    torch.testing.assert_close(outputs(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_a_folder_with_a_scale_of_the_experts_own_goes_back_to_where_it_came_from(tmp_path):
    """As a resumed run loads it; PEFT's patterns name the parameter, not the module."""
    options = {"rank_pattern": {"experts.gate_up_proj": 3}, "alpha_pattern": {"experts.down_proj": 7}}
    model, optimizer, _ = trained("mixtral", lora_options=options)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    models.train(model, optimizer, "llama", 2)
    assert not torch.allclose(outputs(model), expected)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-6)
