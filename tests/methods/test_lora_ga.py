"""LoRA-GA: the published start, from the true gradient, with the function unchanged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import TrainerCallback, default_data_collator

from helpers import models, training
from scalora.layers.peft_lora import find_layers
from scalora.methods.lora_ga import initial_factors


@given(m=st.integers(4, 40), n=st.integers(4, 40), gamma=st.floats(1, 64), seed=st.integers(0, 99))
def test_the_factors_are_the_definition(m, n, gamma, seed):
    rank = -(-min(m, n) // 4)  # 4r ≥ min(m, n): the randomised SVD is exact
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator))
    V, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator))
    sigma = 0.7 ** torch.arange(min(m, n))
    B, A = initial_factors(U * sigma @ V.T, rank, gamma)
    size = m**0.25 / gamma**0.5
    torch.testing.assert_close(A @ A.T, size**2 * torch.eye(rank), rtol=1e-3, atol=1e-3)
    for i in range(rank):  # singular vectors are determined up to their sign
        if i + rank < min(m, n):
            assert float((B[:, i] @ U[:, rank + i]).abs()) == pytest.approx(size, rel=2e-2)
        assert float((A[i] @ V[:, i]).abs()) == pytest.approx(size, rel=2e-2)


class _AtStart(TrainerCallback):
    def __init__(self, kind):
        self.kind = kind

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.logits = models.logits(model, self.kind)
        self.pairs = {x.name: (x.A.detach().clone(), x.Bt.detach().clone()) for x in find_layers(model)}
        self.frozen = all(not x.base.weight.requires_grad and x.base.weight.grad is None for x in find_layers(model))
        self.gradients = [p for p in model.parameters() if p.grad is not None]
        self.state = dict(optimizer.state)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_it_starts_along_the_gradient_with_the_function_unchanged(kind, tmp_path):
    rows = training.rows(kind, n=8, different=8)
    adapted = training.adapt("lora-ga", kind, tmp_path / "base", options={"batches": 2})
    plain = models.logits(adapted.model, kind)
    start = _AtStart(kind)
    made = training.trainer(adapted, kind, tmp_path / "out", dataset=rows, callbacks=[start])

    # The mean gradient over the whole set, by plain autograd on a copy of the model.
    model = training.adapt("lora-ga", kind, tmp_path / "base").model
    layers = find_layers(model)
    for layer in layers:
        layer.base.weight.requires_grad_(True)
    model(**default_data_collator(rows)).loss.backward()
    made.train()

    torch.testing.assert_close(start.logits, plain, rtol=0, atol=1e-5)
    assert start.frozen
    assert not start.gradients
    assert not start.state
    for layer in layers:
        U, sigma, Vt = torch.linalg.svd(layer.base.weight.grad)
        B, A = start.pairs[layer.name]
        size = layer.A.shape[0] ** 0.25 / 4
        if sigma[7] > 1.2 * sigma[8] and sigma[3] > 1.2 * sigma[4]:  # well separated: the subspaces are determined
            assert torch.linalg.matrix_norm(A / size @ Vt[:4].T) == pytest.approx(2, rel=1e-2)
            assert torch.linalg.matrix_norm((B / size).T @ U[:, 4:8]) == pytest.approx(2, rel=1e-2)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_trained_it_is_one_plain_lora_on_the_untouched_base(kind, tmp_path):
    base = training.base(kind, tmp_path / "base")
    adapted = training.adapt("lora-ga", kind, tmp_path / "base")
    training.trainer(adapted, kind, tmp_path / "out", learning_rate=5e-3).train()
    frozen = {n.replace(".base_layer", ""): p for n, p in adapted.model.get_base_model().named_parameters()}
    assert all(torch.equal(p, frozen[n]) for n, p in base.named_parameters() if n in frozen)
    adapted.save(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].r == 8
    torch.testing.assert_close(
        models.logits(loaded.merge_and_unload(), kind), models.logits(adapted.model, kind), rtol=0, atol=1e-5
    )


def test_the_training_data_keep_their_order(tmp_path):
    orders = []
    for name in ("lora", "lora-ga"):
        adapted = training.adapt(name, "llama", tmp_path / "base", dropout=0.1)
        made = training.trainer(adapted, "llama", tmp_path / "out", dataset=training.rows("llama", 24, 24), max_steps=9)
        seen, loss = [], made.compute_loss

        def remember(model, inputs, *args, seen=seen, loss=loss, **kwargs):
            seen.append(inputs["input_ids"][:, 0].tolist())
            return loss(model, inputs, *args, **kwargs)

        made.compute_loss = remember
        made.train()
        orders.append((seen, torch.rand(2).tolist()))
    assert orders[0] == orders[1]


def test_rslora_scaling_is_an_option(tmp_path):
    adapted = training.adapt("lora-ga", "llama", tmp_path / "base", options={"rslora": True})
    assert find_layers(adapted.model)[0].scale == pytest.approx(8 / 2)


def test_bfloat16_autocast(tmp_path):
    adapted = training.adapt("lora-ga", "llama", tmp_path / "base")
    made = training.trainer(adapted, "llama", tmp_path / "out", bf16=True, learning_rate=5e-3)
    made.train()
    assert training.losses(made)[-1] < training.losses(made)[0]
