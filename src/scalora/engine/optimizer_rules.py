"""Which entries of an optimizer's state move along when columns are rescaled, by class; docs/optimizers.md derives it.

The gradient of Ã = A diag(α) is G B̃ = g_A diag(β): what was gathered from gradients to the power p is multiplied by
βᵖ (state of A) or αᵖ (state of B); step counters stay. Source: arXiv 2510.23818, Lemmas 2 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..common.errors import ScaloraError
from ..layers.sharding import is_sharded


@dataclass(frozen=True)
class StateRule:
    """What one class of optimizers keeps of a parameter, and how it follows its gradients."""

    powers: Mapping[str, int]  # entry → power of the gradient it holds
    # Entries that mix columns: they follow where all columns of a matrix have one factor.
    mixed: Mapping[str, int] = field(default_factory=dict)
    decoupled: bool = False  # weight decay is not added to the gradient
    counts_by_group: bool = False  # steps, so that the state of one parameter cannot start anew
    few_bits: bool = False  # some entries are codes in blocks


_ADAM = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
_CODED = {"qmap1": 0, "qmap2": 0, "absmax1": 0, "absmax2": 0}  # moved with the codes that they belong to
_BNB = {"step": 0, "unorm_vec": 0, **_CODED}
_KAHAN = {"kahan_comp": 0}  # what half precision has lost; refused there

_TORCH = {
    "SGD": StateRule({"momentum_buffer": 1}),
    "Adam": StateRule(_ADAM),
    "AdamW": StateRule(_ADAM, decoupled=True),
    "NAdam": StateRule({"step": 0, "mu_product": 0, "exp_avg": 1, "exp_avg_sq": 2}),
    "RAdam": StateRule({"step": 0, "exp_avg": 1, "exp_avg_sq": 2}),
    "Adamax": StateRule({"step": 0, "exp_avg": 1, "exp_inf": 1}),
    # The momentum of RMSprop and Adadelta's acc_delta gather g/√v and its like: no power of g is left in them.
    "RMSprop": StateRule({"step": 0, "square_avg": 2, "grad_avg": 1, "momentum_buffer": 0}),
    "Adadelta": StateRule({"step": 0, "square_avg": 2, "acc_delta": 0}),
    "Adagrad": StateRule({"step": 0, "sum": 2}),
    "Rprop": StateRule({"step": 0, "prev": 1, "step_size": 0}),
    "Muon": StateRule({"momentum_buffer": 1}, decoupled=True),
    "Adafactor": StateRule({"step": 0}, mixed={"row_var": 2, "col_var": 2, "variance": 2}, decoupled=True),
}
_OTHERS = {
    # exp_avg is a mean of updates, in which no power of g is left.
    "transformers.Adafactor": StateRule(
        {"step": 0, "RMS": 0},
        mixed={"exp_avg_sq_row": 2, "exp_avg_sq_col": 2, "exp_avg_sq": 2, "exp_avg": 0},
        decoupled=True,
    ),
    "optimi.Lion": StateRule({"exp_avg": 1, **_KAHAN}, decoupled=True),
    "optimi.StableAdamW": StateRule(
        {"exp_avg": 1, "exp_avg_sq": 2, "eps_sq": 0, "mean_square": 0, **_KAHAN}, decoupled=True, counts_by_group=True
    ),
    "pytorch_optimizer.Lion": StateRule({"exp_avg": 1}),
    "pytorch_optimizer.StableAdamW": StateRule({"exp_avg": 1, "exp_avg_sq": 2, **_KAHAN}, counts_by_group=True),
    "pytorch_optimizer.AdEMAMix": StateRule({"exp_avg": 1, "exp_avg_slow": 1, "exp_avg_sq": 2}, counts_by_group=True),
    "pytorch_optimizer.Muon": StateRule({"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2}, counts_by_group=True),
    "pytorch_optimizer.SOAP": StateRule(
        {"exp_avg": 1},
        mixed={"exp_avg_sq": 2, "GG": 2, "Q": 0, "precondition_frequency": 0, "shampoo_beta": 0},
        decoupled=True,
        counts_by_group=True,
    ),
}


def _quantised() -> Iterator[tuple[str, StateRule]]:
    """bitsandbytes and torchao; what bitsandbytes calls Adam decouples its weight decay, as its AdamW does."""
    for name, powers, decoupled in (
        ("AdamW", {"state1": 1, "state2": 2}, True), ("Adam", {"state1": 1, "state2": 2}, True),
        ("AdEMAMix", {"state1": 1, "state2": 2}, True), ("Lion", {"state1": 1}, True),
        ("SGD", {"state1": 1}, False), ("RMSprop", {"state1": 2}, False), ("Adagrad", {"state1": 2}, False),
    ):  # fmt: skip
        for paged in ("", "Paged"):
            for bits in ("", "8bit", "32bit"):
                yield (
                    f"bitsandbytes.{paged}{name}{bits}",
                    StateRule({**powers, **_BNB}, decoupled=decoupled, few_bits=True),
                )
    for bits in ("8bit", "4bit", "Fp8"):
        yield f"torchao.Adam{bits}", StateRule(_ADAM, few_bits=True)
        yield f"torchao.AdamW{bits}", StateRule(_ADAM, decoupled=True, few_bits=True)


_RULES: Mapping[str, StateRule] = (
    {f"torch.{name}": rule for name, rule in _TORCH.items()} | _OTHERS | dict(_quantised())
)
_BY_COLUMN = ", ".join(name for name, rule in _TORCH.items() if not rule.mixed)
_WAY_OUT = f"use one of {_BY_COLUMN} from torch.optim, or another that docs/optimizers.md lists"

_AVERAGES = "it evaluates an average of points, and an event keeps the function of one point only"
_PROJECTED = "it keeps a projection of the gradient, which mixes columns"
_MATRICES = "its preconditioners mix columns, and begin at a multiple of I, which does not follow the gradient"
_REASONS = {
    "torch.ASGD": _AVERAGES,
    "torch.LBFGS": "it keeps differences of parameters and of gradients, flattened together",
    "schedulefree": _AVERAGES,
    "galore_torch": _PROJECTED,
    "apollo_torch": _PROJECTED,
    "lomo_optim": "it steps during the backward pass, before an event could be made",
    "pytorch_optimizer.ScheduleFreeSGD": _AVERAGES,
    "pytorch_optimizer.ScheduleFreeAdamW": _AVERAGES,
    "pytorch_optimizer.ScheduleFreeRAdam": _AVERAGES,
    "pytorch_optimizer.ScheduleFreeWrapper": _AVERAGES,
    "pytorch_optimizer.Shampoo": _MATRICES,
    "pytorch_optimizer.ScalableShampoo": _MATRICES,
}
# Options of a group → why the state has no rule with them.
_OPTIONS = {
    "use_gc": "takes the mean over columns from each gradient",
    "adanorm": "divides gradients of one step by norms of others",
    "gradient_release": "steps during the backward pass, before an event could be made",
    "initial_accumulator_value": "begins the sum of squares at what no gradient gave, which does not follow them",
}


def state_rule(optimizer: Optimizer, *, one_factor: bool = False, turned: bool = False) -> StateRule:
    """What this optimizer keeps, and how it follows its gradients.

    Args:
        optimizer: of exactly one of the classes that docs/optimizers.md lists: a subclass may mean something else.
        one_factor: whether all columns of a matrix are rescaled by one factor, so that entries that mix them follow.
        turned: whether means of gradients are multiplied by matrices too, for which they are gathered.

    Raises:
        ScaloraError: the class has no exact rule or is unknown; or its weight decay is added to the gradient; or an
            option makes it another. The message gives the reason and a way out.
    """
    cls = type(optimizer)
    package = cls.__module__.partition(".")[0]
    rule = _RULES.get(f"{package}.{cls.__qualname__}")
    if rule is None:
        why = _reason(cls)
        raise ScaloraError(
            f"optimizer is {cls.__module__}.{cls.__qualname__}: no exact rule is known for carrying its state along"
            f"{f', since {why}' if why else ''}; {_WAY_OUT}"
        )
    for group in optimizer.param_groups:
        _check_group(cls.__name__, group, rule)
    if rule.mixed:
        _check_mixed(optimizer, rule, one_factor)
    if turned and rule.few_bits and _spread(optimizer):
        raise ScaloraError(
            f"{cls.__name__} keeps codes in blocks that are spread over processes, which cannot be turned: use AdamW "
            "from torch.optim, or DDP"
        )
    return rule


def averages(optimizer: Optimizer) -> bool:
    """Whether what it evaluates is an average of points, so that the parameters are not all that a function is of."""
    return _reason(type(optimizer)) == _AVERAGES


def _reason(cls: type) -> str | None:
    """Why a class without a rule has none, where that is known."""
    package = cls.__module__.partition(".")[0]
    return _REASONS.get(f"{package}.{cls.__qualname__}", _REASONS.get(package))


def decay_rates(optimizer: Optimizer) -> dict[Tensor, Any]:
    """What share of each parameter its decoupled weight decay takes in the step that was made; of no other any.

    A parameter without a gradient is left alone by all of them.
    """
    rates: dict[Tensor, Any] = {}
    for group in optimizer.param_groups:
        if decay := group.get("weight_decay", 0):
            rates |= {p: decay * _decay_unit(optimizer, group, p) for p in group["params"] if p.grad is not None}
    return rates


def _decay_unit(optimizer: Optimizer, group: Mapping[str, Any], p: Tensor) -> Any:
    """What the decay is multiplied by: the learning rate, unless an option of the class says otherwise."""
    if group.get("fixed_decay"):  # pytorch_optimizer
        return 1.0
    if group.get("decouple_lr"):  # optimi
        return group["lr"] / group["max_lr"]
    if "relative_step" in group:  # transformers.Adafactor, whose rate may be of the parameter's own size
        return type(optimizer)._get_lr(group, optimizer.state[p])  # pyright: ignore
    return group["lr"]


def _check_group(name: str, group: Mapping[str, Any], rule: StateRule) -> None:
    decoupled = rule.decoupled or group.get("decoupled_weight_decay", False) or group.get("weight_decouple", False)
    if group.get("weight_decay", 0) and not decoupled:
        raise ScaloraError(
            f"{name} has weight_decay={group['weight_decay']}, which it adds to the gradient: "
            "its state then cannot be carried along exactly; use AdamW (decoupled decay) or weight_decay=0"
        )
    for option, why in _OPTIONS.items():
        if group.get(option):
            raise ScaloraError(f"{name} has {option}={group[option]}, which {why}: leave it out")
    halves = (torch.float16, torch.bfloat16)
    if group.get("kahan_sum", False) is not False and any(p.dtype in halves for p in group["params"]):
        raise ScaloraError(
            f"{name} has kahan_sum={group['kahan_sum']} on parameters of half precision: what rounding lost of them is "
            "no gradient's; set kahan_sum=False, or keep the adapters in float32"
        )


def _check_mixed(optimizer: Optimizer, rule: StateRule, one_factor: bool) -> None:
    name = type(optimizer).__name__
    if not one_factor:
        raise ScaloraError(
            f"optimizer is {name}, which keeps {', '.join(rule.mixed)} that mix columns: they follow only where all "
            "columns of a matrix have one factor; set scaling='scalar' in ScaLoraConfig (in a recipe "
            "method.options.scaling: scalar), or use AdamW"
        )
    if _spread(optimizer):
        raise ScaloraError(
            f"{name} keeps {', '.join(rule.mixed)}, which mix rows that are spread over processes: use DDP, or AdamW"
        )


def _spread(optimizer: Optimizer) -> bool:
    """Whether processes hold different parts of its parameters."""
    return any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])
