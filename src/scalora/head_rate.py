"""A learning rate of its own for a classification head, which starts at random whatever adapts the rest."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.optim import Optimizer


def set_head_rate(optimizer: Optimizer, model: nn.Module, heads: Collection[str], lr: float) -> None:
    """Give the trained parameters below ``heads`` parameter groups of their own, with this learning rate.

    Args:
        optimizer: one that has not taken a step; its groups are otherwise kept.
        model: whose parameters it holds.
        heads: names of the head's modules in the plain model; wrappers may have put names before and behind them.
        lr: the rate before any schedule, which must be built after this.
    """
    within = {id(p) for name, p in model.named_parameters() if not set(heads).isdisjoint(name.split("."))}
    for group in list(optimizer.param_groups):
        head = [p for p in group["params"] if id(p) in within]
        if head:
            group["params"] = [p for p in group["params"] if id(p) not in within]
            optimizer.add_param_group({**group, "params": head, "lr": lr})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
