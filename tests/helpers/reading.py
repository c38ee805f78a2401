"""Ways of reading each thing that a tiny adapted model was written to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import scalora
from helpers.folders import adapter_folder, trainer_of
from helpers.lives import IDS, Life, base_model, output
from scalora import ScaLoraCallback, ScaLoraConfig

# Reading: each gives the model, and the adapter's name if that is another.


def _from_pretrained(life: Life, folder: Path) -> Any:
    name = life.rng.choice(["default", "mine", life.name])
    return PeftModel.from_pretrained(base_model(life.base), str(folder), adapter_name=name, is_trainable=True), name


def _auto(life: Life, folder: Path) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(str(folder), is_trainable=True), "default"


def _beside_another(life: Life, folder: Path) -> Any:
    model = life.fresh(LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False), "other")
    return _loaded_into(model, folder)


def _loaded_into(model: Any, folder: Path) -> Any:
    model.load_adapter(str(folder), "new", is_trainable=True)
    model.set_adapter("new")
    return model, "new"


def _into_prepared(life: Life, folder: Path) -> Any:
    """As a resumed Trainer loads: the adapter is there already, of the rank that is trained."""
    model = life.fresh(_of_trained_rank(life, folder), life.name)
    scalora.prepare(model, ScaLoraConfig(capacity=life.rng.choice([None, 3])))
    if life.rng.random() < 0.5:
        model.load_adapter(str(folder), life.name, is_trainable=True)
    else:
        set_peft_model_state_dict(model, _tensors(folder), adapter_name=life.name)
    return model


def _into_attached(life: Life, folder: Path) -> Any:
    """Into a model in mid-run, beside its adapter or in place of it."""
    config = _of_trained_rank(life, folder)
    model = life.fresh(config, life.name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if life.rng.random() < 0.5 and not (config.modules_to_save or config.trainable_token_indices):
        return _loaded_into(model, folder)
    model.load_adapter(str(folder), life.name, is_trainable=True)
    return model


def _of_trained_rank(life: Life, folder: Path) -> LoraConfig:
    """The configuration of the folder, or that of the rank that was trained, where the folder holds more columns."""
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    config.inference_mode = False
    own, use = life.config, life.rng.random() < 0.7
    same_scale = all(layer.r[life.name] for layer in life.layers()) and not life.written
    return own if use and same_scale and _scales(life, config) else config


def _scales(life: Life, config: LoraConfig) -> bool:
    """Whether an adapter of the trained ranks has the scales that the folder says (that of scale 1 has not)."""
    other = life.fresh(config, life.name)
    scales = [m.scaling[life.name] for m in other.modules() if life.name in getattr(m, "lora_A", ())]
    ranks = [m.r[life.name] for m in other.modules() if life.name in getattr(m, "lora_A", ())]
    own = life.layers()
    return all(abs(a - b.scaling[life.name]) < 1e-9 for a, b in zip(scales, own, strict=True)) and all(
        a >= b.r[life.name] for a, b in zip(ranks, own, strict=True)
    )


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "adapter_model.safetensors"
    return load_file(path) if path.is_file() else torch.load(folder / "adapter_model.bin", weights_only=True)


def _set_state_dict(life: Life, folder: Path) -> Any:
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    config.inference_mode = False
    model = life.fresh(config, life.name)
    set_peft_model_state_dict(model, _tensors(folder), adapter_name=life.name)
    return model


def _scalora_load(life: Life, folder: Path) -> Any:
    return scalora.load(folder, base=str(life.base)), "default"


def _natively(life: Life, folder: Path) -> Any:
    model = base_model(life.base)
    model.load_adapter(str(folder), adapter_name="new", is_trainable=True)
    return model, "new"


def _state_file(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def _load_state(life: Life, written: tuple[Path, LoraConfig], into: str) -> Any:
    path, config = written
    state = _state_file(path)
    if into == "plain":
        config = _joined(life)
    model = life.fresh(config, life.name, life.native)
    accumulate = "base" if life.written else "adapter"
    if into == "prepared":
        scalora.prepare(model, ScaLoraConfig(accumulate=accumulate))
    elif into == "attached":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        life.handle = scalora.attach(model, optimizer, ScaLoraConfig(accumulate=accumulate))
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    missing = model.load_state_dict(state, strict=path.suffix != ".safetensors")  # which leaves out what is tied
    assert not missing.unexpected_keys
    return model


def _joined(life: Life) -> LoraConfig:
    """The configuration that belongs to the state dict."""
    config = life.config
    if life.written:
        return config
    fields = {name: value for name, value in life.model.peft_config[life.name].to_dict().items() if name != "peft_type"}
    return LoraConfig(**fields)


class _Look(TrainerCallback):
    """What the model computes as training goes on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step, self.output = state.global_step, output(kwargs["model"])


def _resume(life: Life, written: tuple[Path, LoraConfig, ScaLoraConfig]) -> Any:
    """Goes on for a step and back: what it starts from is looked at."""
    folder, config, ours = written
    look, expected = _Look(), output(life.model)
    model = life.fresh(config, life.name)
    trainer_of(life, model, life.place(), 3, ScaLoraCallback(ours), look).train(resume_from_checkpoint=str(folder))
    assert look.step == 2
    torch.testing.assert_close(look.output, expected, rtol=0, atol=1e-5)
    return life.model


def _of_checkpoint(read: Callable[[Life, Path], Any]) -> Callable[[Life, Any], Any]:
    return lambda life, written: read(life, adapter_folder(written[0], life.name))


def _whole(life: Life, folder: Path) -> Any:
    """The model becomes the base of what comes next."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    life.base = folder
    return model


def _exported(life: Life, folder: Path) -> Any:
    return _from_pretrained(life, folder) if (folder / "adapter_config.json").is_file() else _whole(life, folder)


def _through_a_file(life: Life, model: Any) -> Any:
    (folder := life.place()).mkdir(parents=True)
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


READERS: dict[str, dict[str, Callable[[Life, Any], Any]]] = {
    "adapter": {
        "PeftModel.from_pretrained": _from_pretrained,
        "AutoPeftModel": _auto,
        "load_adapter beside another": _beside_another,
        "into a prepared model": _into_prepared,
        "into an attached model": _into_attached,
        "set_peft_model_state_dict": _set_state_dict,
        "scalora.load": _scalora_load,
        "transformers' load_adapter": _natively,
    },
    "state": {
        "load_state_dict, plain": lambda life, written: _load_state(life, written, "plain"),
        "load_state_dict, prepared": lambda life, written: _load_state(life, written, "prepared"),
        "load_state_dict, attached": lambda life, written: _load_state(life, written, "attached"),
    },
    "checkpoint": {
        "resume": _resume,
        "scalora.load of a checkpoint": _of_checkpoint(_scalora_load),
        "PeftModel.from_pretrained of a checkpoint": _of_checkpoint(_from_pretrained),
    },
    "whole": {"AutoModel": _whole},
    "export": {"load the export": _exported},
    "memory": {
        "deepcopy": lambda life, model: copy.deepcopy(model),
        "pickle": lambda life, model: pickle.loads(pickle.dumps(model)),
        "torch.save(model)": _through_a_file,
    },
}
