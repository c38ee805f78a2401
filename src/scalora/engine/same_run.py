"""Whether a saved state belongs to this run: the same settings, layers, ranks, scales and base model."""

from __future__ import annotations

from typing import Any

from ..common.errors import ScaloraError

STATE_KEYS = ("step", "config", "layers", "scales", "base", "constants", "history", "store", "refresh")


def refuse_other_run(state: Any, run: dict[str, Any]) -> None:
    """Compare a handle's saved state with what ``run`` says of this one: config, layers, scales and base.

    Raises:
        ScaloraError: it is no such state, or of another run; the message names what differs.
    """
    if not isinstance(state, dict):
        raise ScaloraError(f"state is a {type(state).__name__}: give what handle.state_dict() returned")
    if missing := sorted(set(STATE_KEYS) - state.keys()):
        raise ScaloraError(f"state lacks {', '.join(missing)}: give what handle.state_dict() returned, all of it")
    for name, value in run["config"].items():
        if (saved := state["config"].get(name)) != value:
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
