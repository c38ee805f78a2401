"""The optimizer's state moves along exactly, or the optimizer is refused by name."""

import pytest
import torch
from torch import nn

import scalora
from helpers import models
from helpers.attached import attached
from scalora import ScaloraError


def test_the_next_step_equals_that_of_an_optimizer_that_saw_transformed_gradients():
    """Lemmas 2 and 4: carry the state along, or feed the transformed gradients from the start; the same, in float64."""
    torch.manual_seed(0)
    m, n, r, steps = 6, 5, 2, 4
    alpha, beta = torch.rand(r).double() + 0.5, torch.rand(r).double() + 0.5
    start = torch.randn(m, r).double(), torch.randn(r, n).double()
    gradients = [(torch.randn(m, r).double(), torch.randn(r, n).double()) for _ in range(steps)]

    from scalora.engine.optimizers import carry_state

    for cls, options in (
        (torch.optim.AdamW, {"amsgrad": True}), (torch.optim.NAdam, {}), (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}), (torch.optim.AdamW, {"fused": True}), (torch.optim.Adam, {"foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (torch.optim.Adadelta, {"lr": 1.0}), (torch.optim.Adagrad, {}), (torch.optim.Rprop, {}),
    ):  # fmt: skip
        if "eps" in cls([nn.Parameter(start[0].clone())]).defaults:
            options = {**options, "eps": 1e-30}  # the rule is exact up to eps
        carried = [nn.Parameter(t.clone()) for t in start]
        transformed = [nn.Parameter(t.clone()) for t in start]
        one, other = (cls(params, **{"lr": 0.01, **options}) for params in (carried, transformed))
        for i, (g_A, g_Bt) in enumerate(gradients):
            last = i == steps - 1
            carried[0].grad, carried[1].grad = g_A.clone(), g_Bt.clone()
            transformed[0].grad, transformed[1].grad = g_A * beta, g_Bt * alpha[:, None]
            if last:
                carry_state(one, carried, [beta, alpha[:, None]])
                for p, q in zip(carried, transformed, strict=True):
                    q.data.copy_(p.data)  # the same point, so that only the state can make a difference
            one.step()
            other.step()
        for p, q in zip(carried, transformed, strict=True):
            torch.testing.assert_close(
                p, q, rtol=1e-10, atol=1e-12, msg=lambda text, cls=cls: f"{cls.__name__}: {text}"
            )


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (torch.optim.LBFGS, {}, "LBFGS"),
        (torch.optim.Adafactor, {}, "Adafactor"),
        (torch.optim.ASGD, {}, "ASGD"),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, "weight_decay=0.1"),
        (torch.optim.Adam, {"weight_decay": 0.1}, "weight_decay=0.1"),
        (type("MyAdam", (torch.optim.AdamW,), {}), {}, "MyAdam"),
    ],
)
def test_optimizers_without_an_exact_rule_are_refused_by_name(cls, options, words):
    model = models.lora("llama")
    before = {name for name, _ in model.named_parameters()}
    optimizer = cls(models.trainable(model), lr=1e-3, **options)
    with pytest.raises(ScaloraError, match=words):
        scalora.attach(model, optimizer)
    assert {name for name, _ in model.named_parameters()} == before  # nothing was changed


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}, {"amsgrad": True}])
def test_optimizer_variants_agree(options):
    model, optimizer, _ = attached(opt=options)
    other, plain, _ = attached(opt={"foreach": False, "amsgrad": options.get("amsgrad", False)})
    models.train(model, optimizer, "llama", 5)
    models.train(other, plain, "llama", 5)
    torch.testing.assert_close(models.logits(model, "llama"), models.logits(other, "llama"), rtol=1e-3, atol=1e-4)
