"""DDP and FSDP2 on two processes: the run of one process, to 1e-6 and better; what cannot be right is refused."""

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import scalora
from helpers import models, two_processes
from helpers.two_processes import spawn
from scalora import ScaloraError
from scalora.layers.sharding import gather_full, is_sharded

CASES = [("llama", "adapter"), ("gpt2", "base")]  # Conv1D: the base weight is sharded along the other dimension


def test_ddp_equals_one_process():
    spawn(_ddp)


def _ddp(rank):
    for kind, accumulate in CASES:
        model = two_processes.model(kind)
        optimizer = two_processes.optimizer(model)
        if accumulate == "adapter":  # attached before it is wrapped, and after
            handle = scalora.attach(model, optimizer, two_processes.config(accumulate))
            wrapped = DistributedDataParallel(model)
        else:
            wrapped = DistributedDataParallel(model)
            handle = scalora.attach(wrapped, optimizer, two_processes.config(accumulate))
        two_processes.train(wrapped, optimizer, kind, rank)
        assert two_processes.difference(handle, two_processes.alone(kind, accumulate)[1]) < 1e-6
        handle.check_ranks()
    with torch.no_grad():
        handle.layers[1].A[0, 0] += rank  # pyright: ignore
    with pytest.raises(ScaloraError, match=rf"diverged in {handle.layers[1].name}:"):  # pyright: ignore
        handle.check_ranks()  # pyright: ignore


def test_fsdp2_equals_one_process_and_saves_whole_adapters(tmp_path):
    spawn(_fsdp2, str(tmp_path / "adapter"))


def _fsdp2(rank, folder):
    for kind, accumulate in CASES:
        alone, reference = two_processes.alone(kind, accumulate)
        model, optimizer, handle = two_processes.sharded(kind, accumulate)
        two_processes.train(model, optimizer, kind, rank)
        assert two_processes.difference(handle, reference) < 1e-6
        handle.check_ranks()
        again = scalora.attach(model, two_processes.optimizer(model), two_processes.config(accumulate))
        again.load_state_dict(handle.state_dict())
        assert torch.equal(again.constants, handle.constants)
        if accumulate == "adapter":
            assert is_sharded(handle.layers[0].accumulated.P)
            scalora.save_plain_lora(model, folder)
            dist.barrier()
            plain = PeftModel.from_pretrained(models.base(kind, torch.float64), folder)
            torch.testing.assert_close(models.logits(plain, kind), models.logits(alone, kind), rtol=0, atol=1e-6)


@pytest.mark.parametrize("refresh", two_processes.REFRESHES, ids=["plain", "white"])
def test_a_refresh_equals_that_of_one_process(refresh):
    spawn(_refresh, refresh)


def _refresh(rank, refresh):
    for kind, accumulate in CASES:
        reference = two_processes.alone(kind, accumulate, refresh)[1]
        model = two_processes.model(kind)
        optimizer = two_processes.optimizer(model)
        handle = scalora.attach(model, optimizer, two_processes.config(accumulate, refresh))
        two_processes.train(DistributedDataParallel(model), optimizer, kind, rank)
        handles = [handle]
        for options in ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
            sharded, optimizer, other = two_processes.sharded(kind, accumulate, refresh=refresh, **options)
            two_processes.train(sharded, optimizer, kind, rank)
            handles.append(other)
        for each in handles:
            assert each.refresh.steps == [two_processes.REFRESH]
            assert two_processes.difference(each, reference) < 1e-6
            each.check_ranks()


def test_what_an_event_sends():
    spawn(_bytes)


def _bytes(rank):
    """The formula of docs/devices.md."""
    model, optimizer, handle = two_processes.sharded("llama", "adapter")
    sent, gather, inner = [], dist.all_gather_into_tensor, handle.rescale

    def counting(output, input, **options):
        sent.append(output.nbytes - input.nbytes)  # what the other processes hold
        return gather(output, input, **options)

    def event():
        dist.all_gather_into_tensor = counting
        inner()
        dist.all_gather_into_tensor = gather

    handle.rescale = event
    two_processes.train(model, optimizer, "llama", rank, steps=1)

    def half(size):
        return -(-size // 2)

    shapes = [(layer.A.shape[0], layer.Bt.shape[1], layer.rank) for layer in handle.layers]
    assert len(sent) == len(set(shapes))  # one collective per shape
    assert sum(sent) == sum(2 * (half(m) * r + half(r) * n) * 8 for m, n, r in shapes)  # float64


def test_fsdp2_in_its_other_forms():
    spawn(_forms)


def _forms(rank):
    reference = two_processes.alone("llama", "adapter")[1]
    replicated = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    for options in (
        {"prepare": False},  # accumulated columns, added after sharding, are whole on every process
        {"mesh": replicated, "opt": {"fused": True}},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"shard_placement_fn": lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % 2 == 0 else Shard(0)},
    ):
        model, optimizer, handle = two_processes.sharded("llama", "adapter", **options)
        two_processes.train(model, optimizer, "llama", rank)
        assert two_processes.difference(handle, reference) < 1e-6, options
        handle.check_ranks()

    model, optimizer, handle = two_processes.sharded("gpt2", "base", dtype=torch.bfloat16)
    inner, errors = handle.rescale, []

    def total(layer):
        W, lost, A, Bt = gather_full(
            [layer.base_weight, handle.store.lost[layer.name], layer.A.detach(), layer.Bt.detach()]
        )
        return W.double() + lost.double() + layer.scale * A.double() @ Bt.double()

    def event():
        before = [total(layer) for layer in handle.layers]
        inner()
        errors.extend(float((total(x) - W).abs().max()) for x, W in zip(handle.layers, before, strict=True))

    handle.rescale = event
    two_processes.train(model, optimizer, "gpt2", rank, steps=4)
    assert 0 < max(errors) < 1e-5  # a bf16 weight of 0.02 alone would be off by 1e-4
    handle.check_ranks()
    state = handle.state_dict()["store"]["lost"]
    assert all(torch.equal(state[name], gather_full([lost])[0]) for name, lost in handle.store.lost.items())


def test_what_flattens_or_replaces_adapters_is_refused():
    spawn(_refused)


def _refused(rank):
    def attached():
        model = two_processes.model("llama")
        optimizer = two_processes.optimizer(model)
        scalora.attach(model, optimizer)
        return model, optimizer

    model, optimizer = attached()
    with pytest.raises(ScaloraError, match=r"not in the optimizer: .*after fully_shard"):
        two_processes.train(two_processes.shard(model), optimizer, "llama", rank, steps=1)

    model, optimizer = attached()
    flat = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ScaloraError, match="was flattened after attach"):
        two_processes.train(flat, optimizer, "llama", rank, steps=1)
    with pytest.raises(ScaloraError, match=r"wrapped by FSDP1.*save it before"):
        flat.state_dict()

    flat = FullyShardedDataParallel(two_processes.model("llama"), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ScaloraError, match=r"FSDP1.*use FSDP2"):
        scalora.attach(flat, two_processes.optimizer(flat))

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    with pytest.raises(ScaloraError, match="leave tensor parallelism out"):
        gather_full([DTensor.from_local(torch.zeros(2, 2), mesh, [Shard(0), Shard(1)])])


def test_deepspeed_is_refused_by_name():
    from accelerate import Accelerator
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    Accelerator(cpu=True)  # its wrappers want one to exist

    model = models.lora("llama")
    optimizer = torch.optim.AdamW(models.trainable(model))
    with pytest.raises(ScaloraError, match=r"DeepSpeedOptimizerWrapper.*use DDP or FSDP2"):
        scalora.attach(model, DeepSpeedOptimizerWrapper(optimizer))
    engine = type("DeepSpeedEngine", (torch.nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})(model)
    with pytest.raises(ScaloraError, match="DeepSpeedEngine is managed by DeepSpeed"):
        scalora.attach(engine, optimizer)
    models.trainable(model)[0].ds_id = 0  # ZeRO-3's mark on a parameter
    with pytest.raises(ScaloraError, match="managed by DeepSpeed"):
        scalora.attach(model, optimizer)
