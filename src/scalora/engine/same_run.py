"""Whether a saved state belongs to this run: the same settings, layers, ranks, scales and base model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..algebra.whitening import EXPONENT
from ..common.errors import ScaloraError, named
from ..layers.peft_lora import AdapterLayer
from ..layers.stand_in import StandIn

STATE_PARTS: dict[str, Any] = {
    "step": int, "config": dict, "layers": dict, "scales": dict, "base": str, "constants": Tensor, "history": dict,
    "store": dict, "refresh": dict | None,
}  # fmt: skip
_BEFORE = {"exponent": EXPONENT}  # what held before there was such a field


def refuse_other_run(state: Any, run: dict[str, Any], constants: Tensor) -> None:
    """Compare a handle's saved state with what ``run`` says of this one: config, layers, scales and base.

    Raises:
        ScaloraError: it is no such state, or of another run; the message names what differs.
    """
    if not isinstance(state, dict):
        raise ScaloraError(f"state is a {type(state).__name__}: give what handle.state_dict() returned")
    if missing := sorted(STATE_PARTS.keys() - state.keys()):
        raise ScaloraError(f"state lacks {', '.join(missing)}: give what handle.state_dict() returned, all of it")
    for name, kind in STATE_PARTS.items():
        if not isinstance(state[name], kind):
            raise ScaloraError(f"state has {name}={named(state[name])}: give what handle.state_dict() returned")
    for name, value in run["config"].items():
        if name == "unsupported":
            continue  # the layers tell
        if (saved := state["config"].get(name, _BEFORE.get(name))) != value:
            raise ScaloraError(
                f"{name} is {value!r}, but the saved run had {saved!r}: resume with the same ScaLoraConfig"
            )
    if state["layers"].keys() != run["layers"].keys():
        raise ScaloraError("the saved run adapted other layers: resume with the same model and target_modules")
    for name, rank in state["layers"].items():
        if rank != run["layers"][name]:
            raise ScaloraError(
                f"layer {name} has rank {run['layers'][name]}, but had {rank}: resume with the same rank"
            )
    if state["scales"].keys() != run["scales"].keys() or state["constants"].shape != constants.shape:
        raise ScaloraError("state has scales or constants of other layers: give what handle.state_dict() returned")
    for name, scale in run["scales"].items():
        if state["scales"][name] != scale:
            raise ScaloraError(
                f"layer {name} has scale {scale} (lora_alpha, use_rslora), but had {state['scales'][name]}: resume "
                "with the same LoraConfig"
            )
    if state["base"] != run["base"]:
        raise ScaloraError(
            f"the base model is another than the saved run's (fingerprint {run['base']}, there {state['base']}): "
            "resume with the model that it was trained on"
        )


def warn_of_missing_state(optimizer: Optimizer, layers: Sequence[AdapterLayer]) -> None:
    """Warn, before the first step, where model and optimizer come from an earlier run, and no state of it was loaded.

    No refusal, since an optimizer that has trained such a model as plain LoRA may be attached to.
    """
    moved = any(
        isinstance(layer.module, StandIn) and (layer.module.held(layer.adapter) or layer.module.base_written)
        for layer in layers
    )
    if moved and any(optimizer.state.get(layer.A) for layer in layers):
        warnings.warn(
            "the model holds what an earlier run has moved, and the optimizer has a state, but handle.load_state_dict "
            "was not called: calibration and the count of steps start anew. If this resumes that run, load the "
            "handle's state too (with Trainer: use ScaLoraCallback, which does)",
            stacklevel=2,
        )
