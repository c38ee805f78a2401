"""The optimizer's state moves along exactly, or the optimizer is refused by name."""

import optimi
import pytest
import pytorch_optimizer
import schedulefree
import torch
import transformers
from torch import nn

import scalora
from helpers import models
from helpers.attached import attached, run
from helpers.twins import stepped, twins
from scalora import ScaloraError
from scalora.engine.optimizers import forget

ADAFACTOR = {"lr": 0.01, "scale_parameter": False, "relative_step": False}
# Class and options of each that has an exact rule, column by column.
BY_COLUMN = {
    "AdamW": (torch.optim.AdamW, {"amsgrad": True}),
    "AdamW-fused": (torch.optim.AdamW, {"fused": True}),
    "Adam-foreach": (torch.optim.Adam, {"foreach": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "Muon": (torch.optim.Muon, {}),
    "Muon-plain": (torch.optim.Muon, {"nesterov": False, "weight_decay": 0.0}),
    "optimi.Lion": (optimi.Lion, {"weight_decay": 0.1}),
    "optimi.StableAdamW": (optimi.StableAdamW, {}),
    "pytorch_optimizer.Lion": (pytorch_optimizer.Lion, {"weight_decay": 0.1}),
    "pytorch_optimizer.StableAdamW": (pytorch_optimizer.StableAdamW, {}),
    "pytorch_optimizer.AdEMAMix": (pytorch_optimizer.AdEMAMix, {"t_alpha_beta3": 10}),
    "pytorch_optimizer.Muon": (lambda p, **o: pytorch_optimizer.Muon([{"params": p, "use_muon": True}], **o), {}),
}
# … and of each that has one where all columns have one factor.
BY_MATRIX = {
    "Adafactor": (torch.optim.Adafactor, {}),
    "transformers.Adafactor": (transformers.Adafactor, ADAFACTOR),
    "transformers.Adafactor-beta1": (transformers.Adafactor, {**ADAFACTOR, "beta1": 0.9}),
    "pytorch_optimizer.SOAP": (pytorch_optimizer.SOAP, {"precondition_frequency": 2}),
}
EVERY = {**BY_COLUMN, **BY_MATRIX}


def _maker(name):
    cls, options = EVERY[name]

    def make(params):
        made = cls(params, **{"lr": 0.01, **options})
        for group in made.param_groups:
            if isinstance(group.get("eps"), float):
                group["eps"] = 1e-30  # momenta of g/√v know no power of g but up to eps
        return made

    return make


def _close(carried, transformed):
    for p, q in zip(carried, transformed, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BY_COLUMN)
def test_the_next_step_equals_that_of_an_optimizer_that_saw_transformed_gradients(name):
    """Lemmas 2 and 4: carry the state along, or feed the transformed gradients from the start; the same, in float64."""
    torch.manual_seed(0)
    alpha, beta = (torch.rand(2, dtype=torch.float64) + 0.5 for _ in range(2))
    _close(*stepped(_maker(name), alpha, beta))


@pytest.mark.parametrize("name", BY_MATRIX)
def test_what_mixes_columns_follows_where_they_have_one_factor(name):
    """A power of two, since SOAP's bases of a null space hang on the last bit."""
    alpha, beta = torch.full((2,), 2.0), torch.full((2,), 0.25)
    (carried, one), (transformed, other) = twins(_maker(name), alpha, beta, steps=6)
    for p, q in zip(carried, transformed, strict=True):
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in one.state[p].items():
            torch.testing.assert_close(value, other.state[q][key], rtol=1e-10, atol=1e-12)
    one.step()
    other.step()
    _close(carried, transformed)


@pytest.mark.parametrize("name", BY_MATRIX)
def test_it_does_not_follow_where_they_have_several(name):
    """Why these are refused without scaling='scalar'."""
    carried, transformed = stepped(_maker(name), torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.25]), steps=6)
    assert max(float((p - q).detach().abs().max()) for p, q in zip(carried, transformed, strict=True)) > 1e-4


def _attachable(name, lr=None):
    cls, options = EVERY[name]
    model = models.lora("llama")
    lr = lr or (1e-3 if "Lion" in name else 3e-3)
    if name in ("Adadelta", "Adafactor"):
        lr = 1.0 if name == "Adadelta" else 0.1
    return model, cls(models.trainable(model), **{**options, "lr": lr})


def _scaling(name):
    return {"scaling": "scalar"} if name in BY_MATRIX else {}


@pytest.mark.parametrize("name", EVERY)
def test_no_event_changes_the_function(name):
    model, optimizer = _attachable(name)
    handle = run(model, optimizer, **_scaling(name))
    if name in BY_MATRIX:
        assert all(len(f.unique()) == 1 for pair in handle.factors.values() for f in pair)


@pytest.mark.parametrize("name", EVERY)
def test_white_coordinates_with_each(name):
    model, optimizer = _attachable(name)
    run(model, optimizer, steps=14, coordinates="white", **_scaling(name))


@pytest.mark.parametrize("name", EVERY)
def test_refreshing_with_each(name):
    """Refused where steps are counted for all parameters together: one of them cannot start anew."""
    model, optimizer = _attachable(name)
    config = {"refresh": 4, "interval": None, **_scaling(name)}
    if (name.startswith("pytorch_optimizer") and "Lion" not in name) or "Stable" in name:
        with pytest.raises(ScaloraError, match=r"refresh=4 .*counts its steps for all parameters together"):
            scalora.attach(model, optimizer, config)
        return
    handle = scalora.attach(model, optimizer, config)
    models.train(model, optimizer, "llama", 10)
    assert handle.refresh.steps == [4, 8]
    assert torch.isfinite(models.logits(model, "llama")).all()


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (torch.optim.LBFGS, {}, "LBFGS.*since it keeps differences"),
        (torch.optim.ASGD, {}, "ASGD.*since it evaluates an average"),
        (torch.optim.Adafactor, {}, "row_var, col_var, variance that mix columns.*scaling='scalar'.*AdamW"),
        (transformers.Adafactor, ADAFACTOR, "exp_avg_sq_row.*scaling='scalar'"),
        (pytorch_optimizer.SOAP, {}, "GG.*scaling='scalar'"),
        (schedulefree.AdamWScheduleFree, {}, "AdamWScheduleFree.*since it evaluates an average.*use one of"),
        (schedulefree.SGDScheduleFree, {}, "SGDScheduleFree.*since it evaluates an average"),
        (pytorch_optimizer.ScheduleFreeAdamW, {}, "ScheduleFreeAdamW.*since it evaluates an average"),
        (pytorch_optimizer.Shampoo, {}, "Shampoo.*since its preconditioners mix columns"),
        (pytorch_optimizer.ScalableShampoo, {}, "Shampoo.*since its preconditioners mix columns"),
        (type("GaLoreAdamW", (torch.optim.AdamW,), {"__module__": "galore_torch.adamw"}), {}, "since it keeps a proj"),
        (type("APOLLOAdamW", (torch.optim.AdamW,), {"__module__": "apollo_torch.apollo"}), {}, "since it keeps a proj"),
        (type("Lomo", (torch.optim.SGD,), {"__module__": "lomo_optim.lomo"}), {}, "since it steps during the backward"),
        (pytorch_optimizer.Adan, {}, "Adan: no exact rule is known"),
        (pytorch_optimizer.Lion, {"use_gc": True}, "use_gc=True, which takes the mean over columns"),
        (pytorch_optimizer.Lion, {"weight_decay": 0.1, "weight_decouple": False}, "weight_decay=0.1"),
        (optimi.Lion, {"gradient_release": True}, "gradient_release=True, which steps during the backward pass"),
        (
            torch.optim.Adagrad,
            {"initial_accumulator_value": 0.1},
            "initial_accumulator_value=0.1, which begins the sum",
        ),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, "weight_decay=0.1"),
        (torch.optim.Adam, {"weight_decay": 0.1}, "weight_decay=0.1"),
        (type("MyAdam", (torch.optim.AdamW,), {}), {}, "MyAdam"),
    ],
)
def test_optimizers_without_an_exact_rule_are_refused_by_name(cls, options, words):
    model = models.lora("llama")
    before = {name for name, _ in model.named_parameters()}
    optimizer = cls(models.trainable(model), **{"lr": 1e-3, **options})
    with pytest.raises(ScaloraError, match=words):
        scalora.attach(model, optimizer)
    assert {name for name, _ in model.named_parameters()} == before  # nothing was changed


@pytest.mark.parametrize("name", ["Lookahead", "ScheduleFreeWrapper", "TRAC", "OrthoGrad"])
def test_what_wraps_an_optimizer_and_steps_otherwise_is_refused(name):
    model = models.lora("llama")
    inner = torch.optim.AdamW(models.trainable(model), lr=1e-3)
    with pytest.raises(ScaloraError, match=f"{name}: no exact rule is known"):
        scalora.attach(model, getattr(pytorch_optimizer, name)(inner))


@pytest.mark.parametrize("cls", [torch.optim.Adafactor, torch.optim.AdamW])
def test_one_factor_for_all_columns_where_a_state_mixes_them(cls):
    """The floor of column norms would raise a column by itself, which is right for AdamW only."""
    model = models.lora("llama")
    models.train(model, torch.optim.AdamW(models.trainable(model), lr=1e-2), "llama", 2)
    handle = scalora.attach(model, cls(models.trainable(model), lr=1e-3), {"scaling": "scalar", "interval": 1})
    for layer in handle.layers:
        layer.A.data[:, 0] *= 1e-6
    models.train(model, handle.optimizer, "llama", 1)
    assert {len(alpha.unique()) for alpha, _ in handle.factors.values()} == {1 if cls is torch.optim.Adafactor else 2}


def test_a_rate_that_the_optimizer_makes_itself_gives_no_constant():
    model = models.lora("llama")
    optimizer = transformers.Adafactor(models.trainable(model))  # relative_step: lr=None
    with pytest.raises(ScaloraError, match=r"lipschitz=2.0 needs one positive learning rate"):
        scalora.attach(model, optimizer, {"scaling": "scalar", "lipschitz": 2.0})
    run(model, optimizer, scaling="scalar")


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (torch.optim.Adafactor, "mix rows that are spread over processes"),
        (
            type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "torchao.optim.adam"}),
            "codes in blocks that are spread",
        ),
    ],
)
def test_what_cannot_be_turned_or_mixed_where_it_is_spread_is_refused(cls, words, monkeypatch):
    model = models.lora("llama")
    optimizer = cls(models.trainable(model), lr=1e-3)
    monkeypatch.setattr("scalora.engine.optimizer_rules.is_sharded", lambda tensor: True)  # as FSDP2's are
    with pytest.raises(ScaloraError, match=words):
        scalora.attach(model, optimizer, {"scaling": "scalar", "coordinates": "white"})


def test_sums_of_what_half_precision_lost_are_refused():
    model = models.lora("llama").to(torch.bfloat16)
    optimizer = optimi.StableAdamW(models.trainable(model), lr=1e-3)
    with pytest.raises(ScaloraError, match=r"kahan_sum=None on parameters of half precision.*kahan_sum=False"):
        scalora.attach(model, optimizer)
    run(model, optimi.StableAdamW(models.trainable(model), lr=1e-2, kahan_sum=False), tolerance=0.05)


def test_why_schedule_free_is_refused():
    """An event that keeps the function of the point y changes that of the average x, whatever becomes of x."""
    torch.manual_seed(0)
    y, x = ([torch.randn(6, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)] for _ in range(2))
    alpha, beta = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.25])
    moved = y[0] * (1 - alpha * beta) @ y[1].mT
    for factors in ((alpha, beta), (torch.ones(2), torch.ones(2))):  # rescaled as y is, or left
        after = (x[0] * factors[0]) @ (x[1] * factors[1]).mT + moved
        assert (after - x[0] @ x[1].mT).abs().max() > 0.1


def test_paged_states_start_anew_in_place():
    """Their memory is never freed, so that the next state must be written where the former was."""
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param])
    optimizer.state[param] = {"step": 3, "state1": torch.ones(3), "qmap1": torch.ones(2), "absmax1": torch.ones(1)}
    paged = optimizer.state[param]["state1"]
    paged.is_paged = True
    forget(optimizer, param)
    state = optimizer.state[param]
    assert state["state1"] is paged
    assert (state["step"], float(paged.sum()), float(state["absmax1"]), float(state["qmap1"].sum())) == (0, 0, 0, 2)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}, {"amsgrad": True}])
def test_optimizer_variants_agree(options):
    model, optimizer, _ = attached(opt=options)
    other, plain, _ = attached(opt={"foreach": False, "amsgrad": options.get("amsgrad", False)})
    models.train(model, optimizer, "llama", 5)
    models.train(other, plain, "llama", 5)
    torch.testing.assert_close(models.logits(model, "llama"), models.logits(other, "llama"), rtol=1e-3, atol=1e-4)
