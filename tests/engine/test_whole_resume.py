"""Resume takes its state from the folder it was told, whole or not at all; train() again works as with plain LoRA."""

import shutil

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from helpers.zoo import KINDS, same
from scalora import ScaLoraCallback, ScaLoraConfig, ScaloraError

pytestmark = pytest.mark.filterwarnings("ignore")
KIND = KINDS["llama"]
ROWS = [{"input_ids": ids, "labels": ids} for ids in KIND.inputs["input_ids"].repeat(4, 1)]
STORES = ["adapter", "base"]


def _trainer(folder, accumulate="adapter", adapter="default", cls=Trainer, callbacks=(), lora=None, **options):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "report_to": "none",
        "use_cpu": True, "seed": 5, "disable_tqdm": True, "logging_steps": 2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    callback = ScaLoraCallback(ScaLoraConfig(interval=1, accumulate=accumulate))
    torch.manual_seed(5)
    make = {} if "model_init" in options else {"model": _model(adapter, **(lora or {}))}
    init = {"model_init": options.pop("model_init")} if "model_init" in options else {}
    trainer = cls(
        **make, **init, args=TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[callback, *callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _model(adapter="default", **options):
    from peft import LoraConfig, get_peft_model

    base = KIND.base()
    torch.manual_seed(5)
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=4, **KIND.lora, **options), adapter_name=adapter)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Whole runs, by store and adapter name: the folder and the function at the end."""
    made = {}

    def give(accumulate, adapter="default"):
        key = accumulate, adapter
        if key not in made:
            folder = tmp_path_factory.mktemp("run") / "out"
            trainer = _trainer(folder, accumulate, adapter)
            trainer.train()
            made[key] = folder, KIND.output(trainer.model)
        return made[key]

    return give


NEEDED = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "scalora.safetensors"]


@pytest.mark.parametrize("accumulate", STORES)
@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("missing", [*NEEDED, "adapter_model.safetensors", "scalora_base.safetensors"])
def test_what_a_checkpoint_lacks_is_refused_by_name(accumulate, adapter, missing, run, tmp_path):
    if accumulate == "adapter" and missing == "scalora_base.safetensors":
        pytest.skip("there is none")
    folder, _ = run(accumulate, adapter)
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    paths = list((tmp_path / "checkpoint-4").rglob(missing))
    assert len(paths) == 1
    paths[0].unlink()
    trainer = _trainer(tmp_path / "again", accumulate, adapter)
    before = KIND.output(trainer.model)
    with pytest.raises((ScaloraError, ValueError, FileNotFoundError)) as refusal:  # transformers' own among them
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    if missing == "adapter_model.safetensors":
        same(KIND.output(trainer.model), before, 0)
        assert "checkpoint" in str(refusal.value)
    else:
        assert refusal.type is ScaloraError or missing == "trainer_state.json"
        assert missing in str(refusal.value)
    assert not (tmp_path / "again" / "checkpoint-6").exists()


@pytest.mark.parametrize("accumulate", STORES)
@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("name", ["checkpoint-4", "copied"])
def test_a_resumed_run_takes_the_folder_that_it_was_told(accumulate, adapter, name, run, tmp_path):
    folder, expected = run(accumulate, adapter)
    shutil.copytree(folder / "checkpoint-4", tmp_path / "elsewhere" / name)
    out = tmp_path / "out"  # where a checkpoint of that name lies too, of another run
    other = _trainer(out, accumulate, adapter, learning_rate=5e-2)
    other.train()
    trainer = _trainer(out, accumulate, adapter)
    trainer.train(resume_from_checkpoint=str(tmp_path / "elsewhere" / name))
    assert torch.equal(KIND.output(trainer.model), expected)


@pytest.mark.parametrize("accumulate", STORES)
def test_states_of_another_checkpoint_are_refused(accumulate, run, tmp_path):
    """A checkpoint put together from two."""
    folder, _ = run(accumulate)
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(folder / "checkpoint-6" / "scalora.safetensors", tmp_path / "checkpoint-2")
    trainer = _trainer(tmp_path / "again", accumulate)
    with pytest.raises(ScaloraError, match=r"but the saved run had|not those of the saved run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("was", STORES)
def test_a_checkpoint_of_the_other_store_is_refused_in_one_sentence(was, adapter, run, tmp_path):
    folder, _ = run(was, adapter)
    other = next(store for store in STORES if store != was)
    trainer = _trainer(tmp_path, other, adapter)
    before = KIND.output(trainer.model)
    with pytest.raises(ScaloraError, match=f"of a run with accumulate='{was}'") as refusal:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert "size mismatch" not in str(refusal.value)
    same(KIND.output(trainer.model), before, 0)


# train() again.


class _Stop(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("accumulate", STORES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_training_again_after_it_ended_early(accumulate, error, tmp_path):
    trainer = _trainer(tmp_path, accumulate, callbacks=[_Stop(error)])
    with pytest.raises(type(error)):
        trainer.train()
    reached = KIND.output(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 6
    assert not torch.equal(KIND.output(trainer.model), reached)
    handle = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ScaLoraCallback)).handle
    assert handle is not None
    assert [event.step for event in handle.stats] == [0, 1, 2, 3, 4, 5]


class _OutOfMemory(Trainer):
    fails = 1

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2 and type(self).fails:
            type(self).fails -= 1
            raise RuntimeError("CUDA out of memory. (simulated)")
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("accumulate", STORES)
def test_auto_find_batch_size_tries_again(accumulate, tmp_path):
    _OutOfMemory.fails = 1
    trainer = _trainer(tmp_path, accumulate, cls=_OutOfMemory, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer.train()
    assert trainer.state.global_step == 6
    assert (tmp_path / "checkpoint-6" / "scalora.safetensors").is_file()


@pytest.mark.parametrize("accumulate", STORES)
def test_every_trial_of_a_search_keeps_its_state_in_its_own_folder(accumulate, tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = _trainer(
        tmp_path, accumulate, model_init=lambda trial=None: _model(), max_steps=4, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.hyperparameter_search(
        direction="minimize", backend="optuna", n_trials=2,
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
    )  # fmt: skip
    found = sorted(str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("scalora.safetensors"))
    assert found == [f"run-{n}/checkpoint-{step}" for n in (0, 1) for step in (2, 4)]
    again = _trainer(tmp_path / "again", accumulate, max_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "run-1" / "checkpoint-4"))
    assert again.state.global_step == 5


def test_float16_on_a_cpu_resumes_without_a_scaler(tmp_path):
    trainer = _trainer(tmp_path / "out", fp16=True)
    trainer.train()
    assert not (tmp_path / "out" / "checkpoint-4" / "scaler.pt").exists()
    again = _trainer(tmp_path / "out", fp16=True)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert torch.equal(KIND.output(again.model), KIND.output(trainer.model))
