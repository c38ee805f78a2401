"""All adapters in two products, against autograd on the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.layers.products import Adapter, add_adapters


def _definition(result, x, adapters):
    for A, B, scale, _ in adapters:
        result = result + scale * (x @ A.mT) @ B.mT
    return result


def _adapters(ranks, trained, dtype, m=7, n=5):
    """Matrices of these ranks; `trained` holds (lora_A, lora_B) for each."""
    return [
        Adapter(
            torch.randn(r, n, dtype=dtype).requires_grad_(of_lora_A),
            torch.randn(m, r, dtype=dtype).requires_grad_(of_lora_B),
            s,
        )
        for r, (of_lora_A, of_lora_B), s in zip(ranks, trained, (1.0, 2.0, 0.3), strict=False)
    ]


@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    trained=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=3),
    shape=st.sampled_from([(3,), (2, 4), (1, 2, 3)]),
    inner=st.booleans(),
)
def test_it_is_the_definition(ranks, trained, shape, inner):
    adapters = _adapters(ranks, trained, torch.float64)
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=inner)
    result = torch.randn(*shape, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*shape, 7, dtype=torch.float64)
    leaves = [t for t in (result, x, *(m for a in adapters for m in a[:2])) if t.requires_grad]
    found = add_adapters(result, x, adapters)
    wanted = _definition(result, x, adapters)
    torch.testing.assert_close(found, wanted)
    gradients = (torch.autograd.grad((out * weights).sum(), leaves) for out in (found, wanted))
    for g, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(g, theirs)


def test_the_inputs_stay_as_they_are():
    adapters = _adapters([2, 3], [(True, True), (False, False)], torch.float32)
    result, x = torch.randn(4, 7), torch.randn(4, 5)
    before = [t.detach().clone() for t in (result, x, *(m for a in adapters for m in a[:2]))]
    add_adapters(result, x, adapters).sum().backward()
    after = [result, x, *(m.detach() for a in adapters for m in a[:2])]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_float32_adapters_on_a_bf16_layer_get_float32_gradients():
    adapters = _adapters([2, 3], [(True, True), (False, False)], torch.float32)
    result, x = torch.randn(4, 7).bfloat16().requires_grad_(), torch.randn(4, 5, requires_grad=True)
    out = add_adapters(result, x, adapters)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert [t.grad.dtype for t in (*adapters[0][:2], x)] == [torch.float32] * 3
    assert result.grad.dtype == torch.bfloat16
    exact = torch.autograd.grad(_definition(result.float(), x, adapters).sum(), [*adapters[0][:2], x])
    for found, wanted in zip((*adapters[0][:2], x), exact, strict=True):
        assert (found.grad - wanted).norm() <= 0.02 * wanted.norm()


def test_a_second_derivative_is_refused_not_wrong():
    adapters = _adapters([2], [(True, True)], torch.float32)
    x = torch.randn(4, 5, requires_grad=True)
    (g,) = torch.autograd.grad(add_adapters(torch.zeros(4, 7), x, adapters).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_what_waits_for_backward_does_not_grow_with_the_frozen_columns():
    kept = []
    for frozen in (1, 64):
        adapters = _adapters([2, frozen], [(True, True), (False, False)], torch.float32)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            add_adapters(torch.randn(50, 7), torch.randn(50, 5, requires_grad=True), adapters)
        mine = {id(m) for a in adapters for m in a[:2]}
        kept.append(sum(t.untyped_storage().nbytes() for t in saved if id(t) not in mine))
    assert kept[0] == kept[1]
