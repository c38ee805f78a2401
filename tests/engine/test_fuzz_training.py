"""Random lives of a model in training: whatever is done to it in whatever order, only optimizer steps change what it
computes, and with accumulate="adapter" nothing ever changes the base."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import get_args

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import scalora
from scalora import ScaLoraConfig
from scalora.algebra.scaling import ScalingMethod

TOLERANCE = 2e-5  # of outputs of size 1
INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


class Network(nn.Module):
    """Two layers of one shape and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def _base() -> Network:
    torch.manual_seed(5)
    return Network()


class Life(RuleBasedStateMachine):
    @initialize(
        rank=st.integers(1, 4),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        scaling=st.sampled_from(get_args(ScalingMethod)),
        accumulate=st.sampled_from(["adapter", "base"]),
        interval=st.integers(1, 3),
        refresh=st.sampled_from([None, 2, 3, 5]),
        alone=st.booleans(),
        extra=st.integers(0, 6),
    )
    def begin(self, rank, optimizer, scaling, accumulate, interval, refresh, alone, extra):
        self.make_optimizer = OPTIMIZERS[optimizer]
        capacity = rank + extra if accumulate == "adapter" else None  # small: recompressions discard something
        self.config = ScaLoraConfig(
            interval=None if refresh and alone else interval, refresh=refresh, scaling=scaling, accumulate=accumulate,
            capacity=capacity,
        )  # fmt: skip
        self._start(_base(), rank)
        self.expected = self._outputs()

    def _start(self, base: nn.Module, rank: int) -> None:
        rank = min(rank, 2) if self.config.refresh else rank  # the last layer has four directions
        if self.config.capacity is not None:
            self.config = dataclasses.replace(self.config, capacity=max(rank, self.config.capacity))
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["first", "second", "last"])
        self.model = get_peft_model(base, adapters)
        self._attach()
        self.frozen = self._base_weights()

    def _attach(self) -> None:
        self.optimizer = self.make_optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.handle = scalora.attach(self.model, self.optimizer, self.config)

    def _base_weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if "base_layer" in n}

    @torch.no_grad()
    def _outputs(self) -> torch.Tensor:
        return self.model(INPUTS)

    def _about_to_recompress(self) -> bool:
        return getattr(self.handle.store, "free", 3) < (1 if self.config.refresh is None else 3)

    @rule(seed=st.integers(0, 1000), size=st.sampled_from([0.0, 1.0, 100.0]), clear=st.booleans())
    def step(self, seed, size, clear):
        targets = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        (size * (self.model(INPUTS) - targets).square().mean()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        recompressed = self._about_to_recompress()
        between = []
        watch = self.optimizer.register_step_pre_hook(lambda *_: between.append(self._outputs()))  # after ours
        self.optimizer.step()
        watch.remove()
        if not recompressed:
            torch.testing.assert_close(between[0], self.expected, rtol=0, atol=TOLERANCE)
        self.optimizer.zero_grad(set_to_none=clear)
        self.expected = self._outputs()
        assert self.expected.isfinite().all()

    @rule()
    def step_without_gradients(self):
        self.optimizer.zero_grad(set_to_none=True)
        recompressed = self._about_to_recompress()
        self.optimizer.step()
        if recompressed:
            self.expected = self._outputs()

    @rule()
    def save_and_load(self):
        state = copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict(), self.handle.state_dict()])
        self.model = get_peft_model(_base(), copy.deepcopy(self.model.peft_config["default"]))
        self._attach()
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
        self.handle.load_state_dict(state[2])

    @precondition(lambda self: self.config.accumulate == "adapter")
    @rule()
    def disable(self):
        with self.model.disable_adapter():
            assert torch.equal(self._outputs(), _with(self.frozen)(INPUTS))

    @rule()
    def merge_and_unmerge(self):
        self.model.merge_adapter()
        torch.testing.assert_close(self._outputs(), self.expected, rtol=0, atol=TOLERANCE)
        self.model.unmerge_adapter()  # adds and subtracts: rounds the base, which is PEFT's doing
        self.frozen = self._base_weights()

    @rule()
    def detach_and_attach_again(self):
        self.handle.detach()
        self.handle = scalora.attach(self.model, self.optimizer, self.config)

    @precondition(lambda self: self.config.accumulate == "adapter")
    @rule()
    def export(self):
        with tempfile.TemporaryDirectory() as folder:
            path = scalora.save_plain_lora(self.model, Path(folder) / "plain")
            again = PeftModel.from_pretrained(_with(self.frozen), str(path))  # pyright: ignore
        torch.testing.assert_close(again(INPUTS), self.expected, rtol=0, atol=TOLERANCE)

    @rule(rank=st.integers(1, 4))
    def go_on_at_another_rank(self, rank):
        self.handle.detach()
        self._start(self.model.merge_and_unload(adapter_names=list(self.model.active_adapters)), rank)  # pyright: ignore

    @invariant()
    def only_steps_change_the_function(self):
        if hasattr(self, "expected"):
            torch.testing.assert_close(self._outputs(), self.expected, rtol=0, atol=TOLERANCE)

    @invariant()
    def the_base_is_untouched(self):
        if hasattr(self, "frozen") and self.config.accumulate == "adapter":
            assert all(torch.equal(weight, self.frozen[name]) for name, weight in self._base_weights().items())


def _with(weights: dict[str, torch.Tensor]) -> Network:
    network = _base()
    network.load_state_dict({n.split("model.", 2)[-1].replace("base_layer.", ""): w for n, w in weights.items()})
    return network


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
