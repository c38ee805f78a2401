"""DeepSpeed's ZeRO-1 and 2 on two processes, against one process; without DeepSpeed nothing of this runs.

DS_BUILD_OPS=0 pip install deepspeed gives what these need.
"""

import os
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import scalora
from helpers import models, training, two_processes
from scalora import ScaLoraConfig, ScaloraError

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def _config(accumulate="adapter", **fields):
    return ScaLoraConfig(interval=2, accumulate=accumulate, capacity=3 if accumulate == "adapter" else None, **fields)


def _engine(model, groups=None, optimizer=torch.optim.AdamW, **sections):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # it would be compiled at its first use
    deepspeed.init_distributed("gloo", verbose=False)
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, **sections}
    steps = optimizer(groups or models.trainable(model), lr=3e-3)
    engine, wrapped, *_ = deepspeed.initialize(model=model, optimizer=steps, config=settings)
    return engine, wrapped


def _equals_one_process(rank, stage, accumulate, clip, folder):
    sections = {"gradient_accumulation_steps": 2, "gradient_clipping": clip, "zero_optimization": {"stage": stage}}
    engine, zero = _engine(models.lora("llama", r=3), **sections)
    handle = scalora.attach(engine, zero, _config(accumulate))
    one = models.lora("llama", r=3)
    steps = torch.optim.AdamW(models.trainable(one), lr=3e-3)
    reference = scalora.attach(one, steps, _config(accumulate))
    for step in range(8):
        for micro in range(2):
            batch = models.batch("llama", 2 * step + micro)
            engine.backward(engine(**{name: rows.chunk(2)[rank] for name, rows in batch.items()}).loss)
            engine.step()
            (one(**batch).loss / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(models.trainable(one), clip)
        steps.step()
        steps.zero_grad()
    assert (norm > clip) == (clip < 1), "one case clips, the other does not"
    assert len(handle.stats) == 4
    assert two_processes.difference(handle, reference) < 2e-5  # float32
    handle.check_ranks()
    trained = models.logits(engine.module, "llama")
    torch.testing.assert_close(trained, models.logits(one, "llama"), rtol=0, atol=1e-5)
    if accumulate == "adapter":
        scalora.save_plain_lora(engine.module, folder)
        torch.distributed.barrier()
        again = PeftModel.from_pretrained(models.base("llama"), folder)
        torch.testing.assert_close(models.logits(again, "llama"), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "accumulate", "clip"), [(2, "adapter", 5.0), (2, "adapter", 1e-3), (1, "base", 1e-3)]
)
def test_zero_equals_one_process(stage, accumulate, clip, tmp_path):
    two_processes.spawn(_equals_one_process, stage, accumulate, clip, str(tmp_path / "adapter"))


def _trained(folder, resumed):
    made = models.lora("llama", torch.float32)
    sections = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=6, save_steps=3, learning_rate=1e-3, report_to="none",
        use_cpu=True, seed=5, disable_tqdm=True, deepspeed=sections,
    )  # fmt: skip
    callback = scalora.ScaLoraCallback(_config())
    trainer = Trainer(made, arguments, train_dataset=training.rows("llama"), callbacks=[callback])
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resumed else None)
    assert len(callback.handle.stats) == 3
    assert callback.handle.stats[-1].moved > 0
    return [p.detach().clone() for p in made.parameters()]


def _resumes(rank, folder):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None
    straight, resumed = _trained(folder, False), _trained(folder, True)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_trainer_resumes_bitwise_under_zero(tmp_path):
    two_processes.spawn(_resumes, str(tmp_path / "out"))


def _refusals(rank):
    stage = {"zero_optimization": {"stage": 2}}

    def refused(words, engine, zero, **fields):
        with pytest.raises(ScaloraError, match=words):
            scalora.attach(engine, zero, _config(**fields))

    made = _engine(models.lora("llama"), **stage)
    refused("leave refresh and white coordinates out", *made, refresh=4)
    refused("leave refresh and white coordinates out", *made, coordinates="white")
    scalora.attach(*made, _config())
    refused("already has a ScaLora attached", *made)
    refused("leave its bf16 and fp16 sections out", *_engine(models.lora("llama"), **stage, bf16={"enabled": True}))
    model = models.lora("llama")
    first, *rest = models.trainable(model)
    refused("adapters are in several", *_engine(model, [{"params": [first], "lr": 1e-2}, {"params": rest}], **stage))
    refused(
        "DeepSpeedZeroOptimizer_Stage3.*use DDP or FSDP2",
        *_engine(models.lora("llama"), zero_optimization={"stage": 3}),
    )


def test_what_is_not_exact_is_refused():
    two_processes.spawn(_refusals)
