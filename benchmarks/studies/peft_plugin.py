"""A pytest plugin: every LoRA model that PEFT's tests make has ScaLoRA's events behind it, every optimizer before it.

At birth a model gets two events with random gradients. Where lora_B is zero nothing would move; such an adapter is
first given a random lora_B whose update is taken back by accumulated columns, as a refresh leaves it. The function is
that of the birth, but neither half alone is. Models that ``scalora.attach`` refuses stay as PEFT made them.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from weakref import WeakSet

import peft
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import scalora
from scalora.engine.stores import whole_update
from scalora.layers.peft_lora import AdapterLayer

SIZE = 0.05  # standard deviation of a lora_B that was zero
LONGEST = 240  # characters of a message
PLAIN = "none"  # in place of a store's name: the tests as they are


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accumulate", choices=["adapter", "base", PLAIN], default="adapter")
    parser.addoption("--report", help="where the outcomes go, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Suite(str(config.getoption("accumulate")), Path(str(config.getoption("report")))))


class Suite:
    """One run: patches PEFT and torch for as long as it lasts, and remembers what came of it."""

    def __init__(self, accumulate: str, report: Path) -> None:
        self.config, self.place = {"interval": 1, "accumulate": accumulate}, report
        self.models: WeakSet[nn.Module] = WeakSet()
        self.busy = False  # with an optimizer of our own
        self.outcomes: dict[str, str] = {}  # by test: passed, skipped, or what went wrong
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.patch = pytest.MonkeyPatch()
        if accumulate != PLAIN:
            self._after(peft.PeftModel, self._born)
            self._after(Optimizer, self._optimized)

    def _after(self, cls: type, then: Any) -> None:
        """Let ``then`` be called with every object of a class once it is made."""
        init = cls.__init__

        @functools.wraps(init)
        def and_then(made: Any, *args: Any, **kwargs: Any) -> None:
            init(made, *args, **kwargs)
            then(made)

        self.patch.setattr(cls, "__init__", and_then)

    def _born(self, model: nn.Module) -> None:
        self.models.add(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not any(".lora_" in name for name, _ in model.named_parameters()):
            return  # of another kind, or without adapter
        self.busy = True
        try:
            # A generator of its own: tests compare models that were made from one seed.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._events(self._attach("birth", model, torch.optim.SGD(trained or [torch.zeros(1)], lr=0.1)))
        finally:
            self.busy = False

    def _attach(self, when: str, model: nn.Module, optimizer: Optimizer) -> scalora.ScaLora | None:
        try:
            handle = scalora.attach(model, optimizer, self.config)
        except scalora.ScaloraError as refusal:
            self.refusals[kind(str(refusal))] += 1
            return None
        self.counts[when] += 1
        return handle

    def _events(self, handle: scalora.ScaLora | None) -> None:
        if handle is None:
            return
        for layer in handle.layers:
            if not layer.A.any():
                _split(handle, layer)
        for _ in range(2):
            for layer in handle.layers:
                layer.A.grad, layer.Bt.grad = torch.randn_like(layer.A), torch.randn_like(layer.Bt)
            handle.rescale()
        for layer in handle.layers:
            layer.A.grad = layer.Bt.grad = None
        handle.detach()

    def _optimized(self, optimizer: Optimizer) -> None:
        if self.busy:
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model in list(self.models):
            if any(id(p) in own for p in model.parameters() if p.requires_grad):
                self._attach("optimizer", model, optimizer)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out the tests of other methods than LoRA."""
        lora = [item for item in items if _parameters(item).get("config_cls", peft.LoraConfig) is peft.LoraConfig]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(lora)])
        items[:] = lora

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Remember how a test ended."""
        report = yield
        if report.when == "call" or not report.passed:
            raised = None if report.skipped else call.excinfo
            what = report.outcome if raised is None else kind(f"{raised.type.__name__}: {raised.value}")
            self.outcomes[item.nodeid.partition("::")[2]] = what
        return report

    def pytest_unconfigure(self) -> None:
        self.patch.undo()
        found = {"outcomes": self.outcomes, "attached": self.counts, "refused": self.refusals}
        self.place.write_text(json.dumps(found), encoding="utf-8")


@torch.no_grad()
def _split(handle: scalora.ScaLora, layer: AdapterLayer) -> None:
    """The update of a zero adapter in two halves, one trained and one accumulated, that sum to zero."""
    if handle.config.accumulate == "adapter":
        layer.A.normal_(std=SIZE)
        handle.store.receive([whole_update(layer, -1.0)])


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def kind(message: str) -> str:
    """The first line of a message, without what differs between models: names, numbers and lists."""
    text = message.strip().split("\n")[0].strip()
    for pattern, less in (
        (r"\blayer [\w.]+", "layer …"),
        (r"\b\w{2,}(\.\w+)+", "…"),
        (r"'[^']*'(, '[^']*')*", "'…'"),
        (r"-?\d+(\.\d+)?(e-?\d+)?%?", "#"),
    ):
        text = re.sub(pattern, less, text)
    return text[:LONGEST]
