"""accelerate and Trainer on two processes, DDP and FSDP2; resumed runs are bitwise those that went on.

accelerate has no FSDP2 on CPUs: here its state is told otherwise, and everything else is its own code.
"""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainingArguments

import scalora
from helpers import models, two_processes
from helpers.two_processes import spawn
from scalora import ScaLoraCallback
from scalora.layers.sharding import is_sharded


def _fsdp2(accelerator, state_dict_type="FULL_STATE_DICT"):
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type=state_dict_type,
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_accelerate_equals_one_process(fsdp2):
    spawn(_accelerate, fsdp2)


def _accelerate(rank, fsdp2):
    reference = two_processes.alone("llama", "adapter")[1]
    for attach_first in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=two_processes.MICRO)
        if fsdp2:
            _fsdp2(accelerator)
        model, config = two_processes.model("llama"), two_processes.config("adapter")
        optimizer = two_processes.optimizer(model)
        if attach_first:
            handle = scalora.attach(model, optimizer, config)
            model, optimizer = accelerator.prepare(model, optimizer)
        else:
            scalora.prepare(model, config)
            model, optimizer = accelerator.prepare(model, optimizer)
            handle = scalora.attach(model, optimizer, config)
        for i in range(two_processes.STEPS * two_processes.MICRO):
            batch = {name: rows.chunk(2)[rank] for name, rows in models.batch("llama", i).items()}
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(models.trainable(model), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        assert is_sharded(handle.layers[0].accumulated.P) == fsdp2
        assert two_processes.difference(handle, reference) < 1e-6
        handle.check_ranks()


@pytest.mark.parametrize("how", ["ddp", "FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_trainer_resumes_bitwise(tmp_path, how):
    spawn(_trainer, str(tmp_path), how)


def _trainer(rank, folder, how):
    for accumulate, refresh in (
        ("adapter", two_processes.REFRESH),
        ("base", None),
    ):  # refreshed just after the checkpoint
        config, output, found = two_processes.config(accumulate, refresh), f"{folder}/{accumulate}", []
        for resume in (None, f"{output}/checkpoint-4"):
            callback = ScaLoraCallback(config)
            _run(how, callback, output, save_steps=4, resume=resume)
            assert len(callback.handle.stats) == (5 if refresh else 6)
            assert callback.handle.refresh is None or callback.handle.refresh.steps == [refresh]
            found.append(two_processes.figures(callback.handle))
            dist.barrier()
        whole, resumed = found
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("how", ["ddp", "FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_the_best_model_comes_back_with_its_accumulated_update(tmp_path, how):
    spawn(_best, str(tmp_path), how)


def _best(rank, folder, how):
    for accumulate in ("adapter", "base"):
        callback, seen = ScaLoraCallback(two_processes.config(accumulate)), {}

        class Remember(TrainerCallback):
            def on_step_end(self, args, state, control, callback=callback, seen=seen, **kwargs):
                seen[state.global_step] = two_processes.figures(callback.handle)

        trainer = _run(
            how, callback, f"{folder}/{accumulate}", Remember(), save_steps=2, eval_steps=2, eval_strategy="steps",
            load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, learning_rate=1e-2,
        )  # fmt: skip
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # greater_is_better on the loss
        found = two_processes.figures(callback.handle)
        assert all(torch.equal(found[name], seen[2][name]) for name in found if name[1] not in ("alpha", "beta"))


def _run(how, callback, folder, *callbacks, resume=None, **options):
    """Six steps of Trainer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    ids = torch.randint(0, models.VOCABULARY, (48, 10), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=6, logging_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    model = two_processes.model("llama", torch.float32)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[callback, *callbacks])
    if how != "ddp":
        _fsdp2(trainer.accelerator, how)
        trainer.is_fsdp_enabled = True
    trainer.train(resume_from_checkpoint=resume)
    callback.handle.check_ranks()
    assert is_sharded(callback.handle.layers[0].A) == (how != "ddp")
    return trainer
