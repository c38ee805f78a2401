"""Every trainer of TRL's that a CPU can run: its reference, its folders and its resumed runs."""

import importlib
import os

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from helpers import tokenized
from scalora import ScaLoraCallback, ScaLoraConfig, ScaloraError

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl")

STEPS, SAVED = 3, 2
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}
TEMPLATE = "{% for m in messages %}{% generation %}{{ m['content'] + ' ' }}{% endgeneration %}{% endfor %}"
ONLINE = {"num_generations": 4, "max_completion_length": 4}
REFERENCED = ONLINE | {"beta": 0.1}
OWN_TEACHER = ONLINE | {"distillation_topk": 5, "teacher_model_kind": "base"}
DISTILLING = {"max_completion_length": 4, "max_length": 24}


def _rows(*columns):
    words = tokenized.WORDS
    kinds = {
        "text": lambda i: " ".join(words[i % 9 : i % 9 + 6]),
        "prompt": lambda i: words[i % 9],
        "chosen": lambda i: f" {words[(i + 1) % 9]} yes",
        "rejected": lambda i: f" {words[(i + 2) % 9]} no",
        "reference": lambda i: f" {words[(i + 3) % 9]} what",
        "completion": lambda i: f" {words[(i + 1) % 9]} yes",
        "label": lambda i: i % 2 == 0,
        "privileged_context": lambda i: f"{words[(i + 1) % 9]} yes",
        "messages": lambda i: [
            {"role": "user", "content": words[i % 9]},
            {"role": "assistant", "content": f"{words[(i + 1) % 9]} yes"},
        ],
    }
    return datasets.Dataset.from_list([{name: kinds[name](i) for name in columns} for i in range(16)])


def _different_words(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def _teacher(folder):
    """Another model, read from a folder, where trainers look for its tokenizer too."""
    model = tokenized.llama()
    with torch.no_grad():
        model.lm_head.weight.normal_()
    model.save_pretrained(folder / "teacher")
    tokenized.tokenizer().save_pretrained(folder / "teacher")
    return LlamaForCausalLM.from_pretrained(folder / "teacher")


REWARDED = {"reward_funcs": lambda _: _different_words}
TAUGHT = {"teacher_model": _teacher}
# Trainer → where it is, its columns, what its configuration needs, what it needs itself.
TRAINERS = {
    "SFT": ("trl", ["text"], {}, {}),
    "DPO": ("trl", ["prompt", "chosen", "rejected"], {}, {}),
    "KTO": ("trl", ["prompt", "completion", "label"], {}, {}),
    "Reward": ("trl", ["chosen", "rejected"], {}, {}),
    "GRPO": ("trl", ["prompt"], REFERENCED, REWARDED),
    "RLOO": ("trl", ["prompt"], REFERENCED, REWARDED),
    "Distillation": ("trl", ["prompt"], {"max_completion_length": 4}, TAUGHT),
    "CPO": ("trl.experimental.cpo", ["prompt", "chosen", "rejected"], {}, {}),
    "ORPO": ("trl.experimental.orpo", ["prompt", "chosen", "rejected"], {}, {}),
    "TPO": ("trl.experimental.tpo", ["prompt", "chosen", "rejected", "reference"], {}, {}),
    "GKD": ("trl.experimental.gkd", ["messages"], {"max_new_tokens": 4, "max_length": 24}, TAUGHT),
    "GOLD": ("trl.experimental.gold", ["messages"], DISTILLING | {"use_extended_uld": False}, TAUGHT),
    "IWOPD": ("trl.experimental.iw_opd", ["messages"], DISTILLING, TAUGHT),
    "GMPO": ("trl.experimental.gmpo", ["prompt"], REFERENCED, REWARDED),
    "OnlineDPO": ("trl.experimental.online_dpo", ["prompt"], {"max_new_tokens": 4, "max_length": 24}, REWARDED),
    "A2PO": ("trl.experimental.a2po", ["prompt"], {"max_completion_length": 4}, REWARDED),
    "SDFT": ("trl.experimental.sdft", ["prompt", "privileged_context"], OWN_TEACHER, {}),
    "SDPO": ("trl.experimental.sdpo", ["prompt"], OWN_TEACHER, REWARDED),
}
# Their reference or teacher is the trained model with its adapter switched off.
SWITCHED_OFF = {"DPO", "KTO", "GRPO", "RLOO", "GMPO", "OnlineDPO", "SDFT", "SDPO"}


def _base(name):
    model = tokenized.llama()  # seeds the generator too
    if name != "Reward":
        return model
    model.config.num_labels = 1
    return LlamaForSequenceClassification(model.config)


def _make(name, folder, model=None, **options):
    """A trainer with the callback; ``model``: one with an adapter, else TRL makes it."""
    place, columns, own, parts = TRAINERS[name]
    module = importlib.import_module(place)
    defaults = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "report_to": "none",
        "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "disable_tqdm": True, "save_steps": SAVED,
    }  # fmt: skip
    tokenizer = tokenized.tokenizer()
    tokenizer.chat_template = TEMPLATE
    task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if name == "Reward" else {"task_type": "CAUSAL_LM"}
    lora = {"peft_config": LoraConfig(**LORA, **task)} if model is None else {}
    trainer = getattr(module, f"{name}Trainer")(
        _base(name) if model is None else model,
        args=getattr(module, f"{name}Config")(**{**defaults, **own, **options}),
        train_dataset=_rows(*columns), processing_class=tokenizer,
        callbacks=[callback := ScaLoraCallback(ScaLoraConfig(interval=1))],
        **lora, **{part: make(folder) for part, make in parts.items()},
    )  # fmt: skip
    return trainer, callback


def _with_adapter():
    """A PEFT model whose adapter is not zero."""
    return get_peft_model(tokenized.llama(), LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False))


def _first(model, kind):
    return next(module for module in model.modules() if isinstance(module, kind))


def _watch_reference(trainer, callback, untouched):
    """Differences of every pass that leaves the trained adapter out, once an event has moved some of it."""
    layer, twin, differences = _first(trainer.model, LoraLayer), _first(untouched, LlamaModel), []

    def compare(_, args, kwargs, output):
        if callback.handle is None or not callback.handle.stats:
            return
        if layer.disable_adapters or layer.active_adapters != ["default"]:
            kept = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in kwargs}
            with torch.no_grad():
                expected = twin(*args, **kept).last_hidden_state
            differences.append(float((output.last_hidden_state - expected).abs().max()))

    _first(trainer.model, LlamaModel).register_forward_hook(compare, with_kwargs=True)
    return differences


@torch.no_grad()
def _function(model):
    ids = torch.randint(4, tokenized.SIZE, (4, 9), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("case", TRAINERS)
def test_reference_folder_and_resumed_run(case, tmp_path):
    ready = case == "A2PO"  # which takes no peft_config
    untouched = tokenized.llama()  # seeds the generator, from which Trainer takes its order of rows
    trainer, callback = _make(case, tmp_path, _with_adapter() if ready else None)
    differences = _watch_reference(trainer, callback, untouched)
    trainer.train()
    assert max(event.moved for event in callback.handle.stats) > 1e-4
    assert bool(differences) == (case in SWITCHED_OFF)
    assert max(differences, default=0.0) == 0.0
    if ready:
        assert torch.equal(_function(trainer.ref_model), _function(_with_adapter()))

    trained = _function(trainer.model)
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(_base(case), tmp_path / "saved")
    torch.testing.assert_close(_function(loaded), trained, rtol=0, atol=5e-5)
    assert (_function(_base(case)) - trained).abs().max() > 1e-3

    again, _ = _make(case, tmp_path, _with_adapter() if ready else None)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    resumed = again.model.state_dict()
    differ = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, resumed[name])]
    assert not differ


@pytest.mark.parametrize("name", ["KTO", "GRPO", "RLOO"])
def test_a_ready_adapter_is_the_reference_of_its_training(name, tmp_path):
    """TRL copies it to an adapter "ref", and switches to and fro."""
    trainer, callback = _make(name, tmp_path, _with_adapter(), save_strategy="no")
    differences = _watch_reference(trainer, callback, _with_adapter())
    trainer.train()
    assert differences
    assert max(differences) < 1e-5


@pytest.mark.parametrize("name", ["SDFT", "SDPO"])
def test_a_teacher_of_averaged_factors_is_refused(name, tmp_path):
    trainer, _ = _make(name, tmp_path, teacher_model_kind="ema")
    with pytest.raises(ScaloraError, match="teacher_model_kind"):
        trainer.train()
