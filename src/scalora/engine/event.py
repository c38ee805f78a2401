"""One event, from gradients to moved difference, and the optimizer hook that fires it.

Every ``interval`` optimizer steps, after backward, accumulation and clipping and before the update (Algorithm 1 of
arXiv 2510.23818): form the Gram products, solve for (α, β), move s·A diag(1 − α∘β) Bᵀ to the store, rescale A, B, their
gradients and the optimizer's state. Layers of one shape are handled together; nothing is read back from the device.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..algebra.gram import Gram, joined, product_norm
from ..algebra.precision import exact_matmul, representable
from ..algebra.scaling import calibrate, solve_scaling
from ..common.errors import ScaloraError
from ..layers.fingerprint import base_fingerprint
from ..layers.sharding import local_shard, reshard
from .chosen import choose_layers, warn_of_left
from .config import ScaLoraConfig, as_config
from .constants import initial_constants
from .divergence import refuse_divergence
from .groups import Group, Stacked, by_rank, grouped, has_gradient, on_device, per_parameter, stack_with_gram
from .guards import Guards
from .history import Collector, Event, History, by_layer
from .optimizer_rules import state_rule
from .optimizers import carry_state, innermost
from .own_passes import OwnPasses
from .refresh.refresh import Refresh
from .same_run import refuse_other_run, warn_of_missing_state
from .stores import AdapterStore, BaseStore, Move, Store
from .white.steps import WhiteSteps
from .whole import whole

_ATTACHED: weakref.WeakKeyDictionary[Any, weakref.ref[ScaLora]] = weakref.WeakKeyDictionary()  # by LoRA layer
_KNOWN: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers that were attached to before


def attached_to(model: nn.Module) -> ScaLora | None:
    """The handle that rescales this model's layers at present."""
    for module in model.modules():
        if module in _ATTACHED and (handle := _ATTACHED[module]()) is not None and handle.attached:
            return handle
    return None


class ScaLora:
    """The handle of :func:`attach`: rescales the adapters before optimizer steps until :meth:`detach`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: ScaLoraConfig) -> None:
        self.config = config = as_config(config)
        self.optimizer = innermost(optimizer)
        self.alike = bool(state_rule(self.optimizer, one_factor=config.one_factor).mixed)  # factors must be
        if any(
            isinstance(getattr(hook, "__self__", None), ScaLora)
            for hook in self.optimizer._optimizer_step_pre_hooks.values()
        ):
            raise ScaloraError("this optimizer already has a ScaLora attached: call its detach() first")
        self.model = model
        self.layers, others = choose_layers(model, config.unsupported, sketched=config.sketched)
        self.left = {layer.name: why for layer, why in others.items()}  # train as plain LoRA
        self.attached = True
        self.superseded = False
        reshard(model)
        self.guards = Guards(model, self.optimizer, self.layers, config)
        self.guards.check(starting=True)  # refuses what it cannot handle, before anything is changed
        former = attached_to(model)
        # c/s² per layer, of experts for each; NaN until calibrated
        self.constants = initial_constants(self.optimizer, self.layers, config.lipschitz)
        self.store: Store = (
            AdapterStore(model, self.layers, config.columns, config.kept_sum)
            if config.accumulate == "adapter"
            else BaseStore(model, self.layers)
        )
        self.step = 0  # optimizer steps seen
        self.knows_its_past = self.optimizer in _KNOWN  # or a state tells
        _KNOWN.add(self.optimizer)
        self.history = History()
        self.white = None
        if config.coordinates == "white":
            self.white = WhiteSteps(self.layers, self.optimizer, config.exponent)
        self.refresh = None
        if config.period is not None:
            white = self.white.moments if self.white else None
            sizes = self.constants.nan_to_num(1.0)  # orthonormal columns, where L does not say otherwise
            self.refresh = Refresh(self.layers, self.optimizer, self.store, config.period, sizes, white)
        self.own_passes = OwnPasses(self.layers)
        if former is not None:
            former.supersede()
        if self.white:
            self.white.moments.open()  # once the former run looks no more
        for layer in self.layers:
            _ATTACHED[layer.module] = weakref.ref(self)
            layer.module.attached, layer.module.watched = True, None  # pyright: ignore[reportAttributeAccessIssue]
        self._hook = self.optimizer.register_step_pre_hook(self._before_step)
        self._after = self.optimizer.register_step_post_hook(lambda *_: self._watch())
        # A copy of an optimizer has no hooks: it would go on as plain LoRA's.
        self.optimizer.__reduce_ex__ = _refuse_copy  # pyright: ignore[reportAttributeAccessIssue]
        warn_of_left(self.left)

    @property
    def stats(self) -> list[Event]:
        """What happened at each event so far; reading it waits for the device."""
        return self.history.events()

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(α, β) of the latest event by layer, each (r,), of experts (E, r); empty before the first."""
        return by_layer(self.layers, self.history.factors())

    def detach(self) -> None:
        """Stop rescaling. The model keeps its function, the store its content."""
        self.attached = False
        self._hook.remove()
        self._after.remove()
        for layer in self.layers:
            module: Any = layer.module
            module.attached = False
            if layer.A.grad is None and layer.Bt.grad is None:  # no step is to come
                module.watch()
        self.own_passes.stop()
        vars(self.optimizer).pop("__reduce_ex__", None)
        self._detach_parts()

    def supersede(self) -> None:
        """Give the layers up to another optimizer's ScaLoRA; further steps of this one are refused."""
        warnings.warn(
            "another optimizer's ScaLoRA takes over these adapters: steps of the former optimizer are refused",
            stacklevel=4,
        )
        self.attached, self.superseded = False, True
        self.own_passes.stop()
        self._detach_parts()

    def _detach_parts(self) -> None:
        for part in filter(None, (self.refresh, self.white)):
            part.detach()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_copy(protocol)

    def check_ranks(self) -> None:
        """Make sure that all processes hold bitwise the same adapters, factors and accumulated update. A collective.

        Costs a gather of what is sharded and a checksum of every tensor: for tests and for finding faults.

        Raises:
            ScaloraError: a layer differs between processes.
        """
        held = self.config.accumulate == "adapter"
        refuse_divergence(self.layers, held, torch.cat([self.constants, *map(torch.cat, self.history.factors())]))

    def state_dict(self) -> dict[str, Any]:
        """Everything that is neither the model's state nor the optimizer's; tensors, numbers and strings only.

        With a sharded model a collective (every process must call it), and the same on all.
        """
        return {
            "step": self.step,
            **self._run(),
            "constants": self.constants.clone(),
            "history": self.history.state(),
            "store": self.store.state_dict(),
            "refresh": self.refresh.state_dict() if self.refresh else None,
            "white": self.white.moments.state_dict() if self.white else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ScaloraError: it belongs to another configuration, to other layers, ranks or another base model.
        """
        refuse_other_run(state, self._run(), self.constants)
        self.knows_its_past = True
        self.step = int(state["step"])
        self.constants.copy_(state["constants"])
        self.history.load(state["history"])
        self.store.load_state_dict(state["store"])
        if self.refresh:
            self.refresh.load_state_dict(state["refresh"])
        if self.white:
            self.white.moments.load_state_dict(state["white"])

    def _run(self) -> dict[str, Any]:
        """What a state must have in common with this run."""
        return {
            "config": dataclasses.asdict(self.config),
            "layers": {layer.name: layer.rank for layer in self.layers},
            "scales": {layer.name: layer.scale for layer in self.layers},
            "base": self._base(),
        }

    def _base(self) -> str:
        """The fingerprint of what the adapters stand on; of the base store without the weights it writes to."""
        written = [layer.weight for layer in self.layers] if self.config.accumulate == "base" else []
        return base_fingerprint(self.model, written)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.superseded:
            raise ScaloraError(
                "this optimizer's ScaLoRA was superseded by another optimizer's on the same layers: step that one, "
                "or detach() both and attach anew"
            )
        if any(callable(value) for value in (*args[1:], kwargs.get("closure"))):
            raise ScaloraError(
                "optimizer.step(closure) computes gradients too late for a rescaling: call loss.backward() first"
            )
        self.guards.check()
        self.own_passes.check()
        if self.step == 0 and not self.knows_its_past:
            warn_of_missing_state(optimizer, self.layers)
        self.layers[0].module.watched = None  # pyright: ignore[reportAttributeAccessIssue]  # what is written now is ours
        with exact_matmul(self.constants.device):  # a step taken inside autocast, TF32 allowed for the model
            if self.white:
                self.white.before_step(self.step)
            refreshed = self.refresh is not None and self.refresh.before_step(self.step)
            if not refreshed and self.config.interval is not None and self.step % self.config.interval == 0:
                self.rescale()
            for part in filter(None, (self.refresh, self.white)):
                part.remember()
        self.step += 1

    @torch.no_grad()
    def rescale(self) -> None:
        """One event, now: what is otherwise done before every ``interval``-th optimizer step (Algorithm 1).

        The gradients of that step must be in place. Layers without gradients, and all of them where a gradient is not
        finite, keep their columns.
        """
        groups = grouped(self.layers)
        white = self.white.moments.for_members if self.white else lambda members: None
        stacks = [stack_with_gram(group, white(group.members)) for group in groups]
        self.constants = self.constants.to(stacks[0].A.device)
        finite = self._gradients_finite(stacks)
        moves, scaled, record = [], [], Collector()
        for alike in by_rank(stacks):
            alike_groups = [groups[i] for i in alike]
            found = self._factors(alike_groups, joined([stacks[i].gram for i in alike]), finite, record)
            sizes = [len(group.members) for group in alike_groups]
            for i, alpha, beta, d in zip(alike, *(part.split(sizes) for part in found), strict=True):
                moves.append(Move(groups[i].layers, stacks[i].A, d, stacks[i].B))
                scaled += per_parameter(groups[i], alpha, beta)
        params, factors, gradient_factors = zip(*scaled, strict=True)
        self.layers[0].module.watched = None  # pyright: ignore[reportAttributeAccessIssue]  # what is written now is ours
        with whole(self.layers):
            self.store.receive(moves, valid=finite)
            torch._foreach_mul_([local_shard(p) for p in params], factors)
            carry_state(self.optimizer, params, gradient_factors)
        self.history.append(self.step, record, self.store.discarded_share(self.constants[0]))

    def _watch(self) -> None:
        """From now until the next step nobody else shall write to the matrices; one layer looks for all."""
        for layer in self.layers[:1] if self.attached else self.layers:
            layer.module.watch()  # pyright: ignore[reportAttributeAccessIssue]

    def _factors(
        self, groups: list[Group], gram: Gram, finite: Tensor, record: Collector
    ) -> tuple[Tensor, Tensor, Tensor]:
        """α, β and 1 − α∘β (L, r), float64, of members of one rank; 1, 1 and 0 where there is no usable gradient."""
        members = [i for group in groups for i in group.members]
        usable = has_gradient(groups, finite)
        index = on_device(tuple(members), torch.long, self.constants.device)
        c = self.constants[index]
        c = torch.where(c.isnan() & usable, calibrate(gram), c)
        self.constants[index] = c
        alpha, beta, kind = solve_scaling(gram, c=c, method=self.config.scaling, floor=self.config.floor)
        dtype = groups[0].A[0].dtype
        alpha, beta = (representable(torch.where(usable[:, None], f, 1.0), dtype) for f in (alpha, beta))
        if self.alike:  # a floor may have raised some, and columns of zeros keep theirs
            alpha, beta = (f.median(-1, keepdim=True).values.expand_as(f) for f in (alpha, beta))
        size, d = product_norm(gram, torch.ones_like(alpha)), 1 - alpha * beta
        moved = torch.where(size > 0, product_norm(gram, d) / size, 0.0)
        record.collect(members, alpha, beta, torch.where(usable, kind, 0), moved)
        return alpha, beta, d

    def _gradients_finite(self, stacks: list[Stacked]) -> Tensor:
        """Whether this step's gradients are finite and the step will be taken; a tensor, so that nothing waits."""
        device = stacks[0].A.device
        traces = [t.sum().to(device) for s in stacks for t in (s.gram.gAgA, s.gram.gBgB)]
        finite = torch.isfinite(torch.stack(traces)).all()
        found_inf = getattr(
            self.optimizer, "found_inf", None
        )  # fused optimizers own loss scaling and may skip the step
        return finite if found_inf is None else finite & (found_inf.to(device) == 0).all()


def _refuse_copy(protocol: Any) -> NoReturn:
    """Copying and pickling ask for this."""
    raise ScaloraError(
        "an optimizer with ScaLoRA attached, and its handle, cannot be copied or pickled: copy the model and attach "
        "ScaLoRA to a new optimizer on it; states go over by state_dict() and load_state_dict()"
    )
