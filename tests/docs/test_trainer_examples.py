"""The files for axolotl, LLaMA-Factory and ms-swift: they load, and what they hand over is our callback.

Where such a project is not installed a stand-in has the one name of it that the file imports.
"""

import importlib
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from transformers import Trainer, TrainingArguments

import scalora
from helpers import models, training

EXAMPLES = Path(__file__).parents[2] / "examples" / "trainers"


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module with these names in the place of one that is not installed."""

    def put(name, **names):
        if find_spec(name.partition(".")[0]) is not None:
            return
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(sys.modules[name]).update(names)

    return put


def _trains(callback, folder):
    """One event in a Trainer; the callback is one that does that."""
    adapted = training.adapt("lora", "llama", folder / "base")
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(adapted.model, arguments, train_dataset=training.rows("llama"), callbacks=[callback]).train()
    assert callback.handle.stats
    assert models.trainable(adapted.model)


@pytest.fixture
def plugin(stand_in, monkeypatch):
    stand_in("axolotl.integrations.base", BasePlugin=object)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "scalora_axolotl", raising=False)
    return importlib.import_module("scalora_axolotl").ScaloraPlugin()


def _axolotl():
    return yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())


def test_axolotls_plugin_adds_the_callback(plugin, tmp_path):
    content = _axolotl()
    module, name = content["plugins"][0].rsplit(".", 1)
    assert (type(plugin).__module__, type(plugin).__name__) == (module, name)
    plugin.register(content)
    assert content["adapter"] == "lora"  # where nobody has registered the plugin, axolotl knows no scalora
    arguments_module, arguments = plugin.get_input_args().rsplit(".", 1)
    own = getattr(sys.modules[arguments_module], arguments)(**content).scalora
    (callback,) = plugin.add_callbacks_pre_trainer(SimpleNamespace(scalora=own), None)
    assert callback.config == scalora.ScaLoraConfig(**content["scalora"])
    _trains(callback, tmp_path)


def test_axolotls_fused_kernels_stay_off_and_are_refused(plugin):
    kernels = [name for name in _axolotl() if name.endswith("_kernel")]
    assert len(kernels) == 4
    bare = {"adapter": "lora"}  # where axolotl itself would switch them on
    plugin.register(bare)
    assert not any(bare[name] for name in kernels)
    for name in (*kernels, "peft_use_dora", "relora"):
        with pytest.raises(ValueError, match=f"{name} is True.*set it false"):
            plugin.register({name: True})


@pytest.mark.parametrize("given", [{"fsdp_version": 2}, {"fsdp_config": {"reshard_after_forward": True}}])
def test_axolotls_save_under_fsdp_would_lose_columns(plugin, given):
    with pytest.raises(ValueError, match="leaves out what ScaLoRA has accumulated; use DDP"):
        plugin.register(given)


def test_llamafactory_is_given_the_callback(stand_in, monkeypatch, tmp_path):
    given = {}
    stand_in("llamafactory.train.tuner", run_exp=None)
    monkeypatch.setattr(importlib.import_module("llamafactory.train.tuner"), "run_exp", given.update)
    runpy.run_path(str(EXAMPLES / "llamafactory_train.py"), run_name="__main__")
    (callback,) = given["callbacks"]
    assert isinstance(callback, scalora.ScaLoraCallback)
    _trains(callback, tmp_path)
    content = yaml.safe_load((EXAMPLES / "llamafactory.yaml").read_text())
    assert content["finetuning_type"] == "lora"
    assert not any(content[name] for name in ("use_dora", "use_unsloth", "pissa_init"))


def test_swift_finds_the_callback_by_its_name(stand_in, tmp_path):
    stand_in("swift.callbacks", callbacks_map={})
    runpy.run_path(str(EXAMPLES / "scalora_swift.py"))
    made = sys.modules["swift.callbacks"].callbacks_map["scalora"](SimpleNamespace(), SimpleNamespace())
    assert isinstance(made, scalora.ScaLoraCallback)
    _trains(made, tmp_path)
    script = (EXAMPLES / "swift.sh").read_text()
    subprocess.run(["sh", "-n", EXAMPLES / "swift.sh"], check=True)
    assert "--callbacks scalora" in script
    assert "--use_dora false" in script
