"""Numbers and speed: grad scalers, half precision, checkpointing, compiled models."""

import pytest
import torch

import scalora
from helpers import models
from helpers.attached import accumulated, attached, run
from scalora import ScaLoraConfig

SCALERS = {
    "unfused": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "fused-fp16-weights": {"fused": True, "eps": 1e-4},
}


def _scaled_run(opt, dtype=torch.float32, overflow=(), scale=2.0**12, clip=None, steps=6):
    """Training through a scaler; loss × ∞ at the steps in ``overflow``. Logits after each step, and the handle."""
    model, optimizer, handle = attached(dtype=dtype, opt=opt, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    outputs = []
    for step in range(steps):
        loss = model(**models.batch("llama", step)).loss
        scaler.scale(loss * float("inf") if step in overflow else loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(models.trainable(model), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        outputs.append(models.logits(model, "llama"))
    return outputs, handle


@pytest.mark.parametrize("case", SCALERS)
def test_a_grad_scaler_changes_nothing(case):
    dtype = torch.float16 if "fp16" in case else torch.float32
    outputs, handle = _scaled_run(SCALERS[case], dtype, overflow=(3,))
    assert torch.equal(outputs[3], outputs[2])
    assert not torch.equal(outputs[4], outputs[3])
    # A fused optimizer skips inside its own step, which the hook sees; others are not called at all.
    fused = SCALERS[case].get("fused", False)
    assert [event.step for event in handle.stats] == list(range(6 if fused else 5))
    if fused:
        assert handle.stats[3].shares == {"none": 1.0}
    plain, _ = _scaled_run(SCALERS[case], dtype, scale=1.0)
    torch.testing.assert_close(outputs[2], plain[2], rtol=1e-3, atol=1e-2 if dtype is torch.float16 else 1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_with_clipping(fused):
    scaled, _ = _scaled_run({"fused": fused}, clip=0.5, overflow=(4,))
    plain, _ = _scaled_run({"fused": fused}, clip=0.5, scale=1.0)
    torch.testing.assert_close(scaled[3], plain[3], rtol=1e-4, atol=1e-5)
    assert torch.equal(scaled[4], scaled[3])


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_bf16_weights(accumulate):
    """Logits below 1 lie up to 2⁻⁸ apart in bf16: they may move by one such step, whichever way a processor rounds."""
    run(models.lora("llama", torch.bfloat16), accumulate=accumulate, tolerance=1.5 * 2.0**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_an_optimizer_step_inside_autocast_is_as_exact_as_one_outside(dtype, accumulate):
    results = []
    for inside in (False, True):
        model, optimizer, handle = attached(accumulate=accumulate, capacity=8 if accumulate == "adapter" else None)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for _step in range(8):  # a recompression among them
            with torch.autocast("cpu", dtype=dtype):
                loss = model(**models.batch("llama")).loss
                scaler.scale(loss).backward()
                with torch.autocast("cpu", dtype=dtype, enabled=inside):
                    scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(models.logits(model, "llama"))
    assert torch.equal(*results)
    assert max(event.moved for event in handle.stats) > 1e-3


@pytest.fixture(params=["legacy-medium", "tf32"])
def lowered(request):
    """What a user, or TrainingArguments(tf32=True), allows the model's products to be."""
    matmul = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.backends.fp32_precision, *(backend.fp32_precision for backend in matmul)
    if request.param == "tf32":
        torch.backends.fp32_precision = "tf32"  # torch.get_float32_matmul_precision() fails from here on
    else:
        torch.set_float32_matmul_precision("medium")
    yield
    torch.backends.fp32_precision = before[0]
    for backend, precision in zip(matmul, before[1:], strict=True):
        backend.fp32_precision = precision


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch < 2.9")
@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_lowered_matmul_precision(lowered, accumulate):
    model, optimizer, handle = attached(accumulate=accumulate, lr=1e-2)
    inner, errors = handle.rescale, []

    def whole(layer):
        own = layer.A.double() @ layer.Bt.double() * layer.scale
        return own + (accumulated(layer) if accumulate == "adapter" else layer.base_weight.double())

    def event():
        before = [whole(layer) for layer in handle.layers]
        inner()
        pairs = zip(handle.layers, before, strict=True)
        errors.append(max((whole(layer) - W).abs().max().item() for layer, W in pairs))

    handle.rescale = event
    models.train(model, optimizer, "llama", 8)  # a recompression, which keeps everything here, among them
    assert max(errors) < 1e-7
    assert max(event.moved for event in handle.stats) > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reference", [False, True])
def test_checkpointing(reentrant, reference):
    """Also with a pass through disabled adapters between forward and backward, as in DPO."""
    model, twin = models.lora("llama"), models.lora("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    results = []
    for each in (model, twin):
        optimizer = torch.optim.AdamW(models.trainable(each), lr=3e-3)
        scalora.attach(each, optimizer, ScaLoraConfig(interval=1))
        for step in range(4):
            loss = each(**models.batch("llama", step)).loss
            if reference:
                with each.disable_adapter():
                    models.logits(each, "llama")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(models.logits(each, "llama"))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["compiled-before-attach", "compiled-after-attach"])
def test_events_between_compiled_steps_do_not_recompile(case):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, twin = models.lora("llama"), models.lora("llama")
    optimizer, plain = (torch.optim.AdamW(models.trainable(m), lr=3e-3) for m in (model, twin))
    backend = "aot_eager" if case == "compiled-after-attach" else "eager"
    if case == "compiled-after-attach":
        scalora.attach(model, optimizer, ScaLoraConfig(interval=1))
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
        scalora.attach(compiled, optimizer, ScaLoraConfig(interval=1))
    scalora.attach(twin, plain, ScaLoraConfig(interval=1))
    graphs = []
    for step in range(8):  # a recompression of the store among them
        models.train(compiled, optimizer, "llama", 1, start=step)
        models.train(twin, plain, "llama", 1, start=step)
        graphs.append(counters["stats"]["unique_graphs"])
    assert set(graphs) == {1}  # as of the model without an adapter: nothing of ours breaks it
    torch.testing.assert_close(models.logits(model, "llama"), models.logits(twin, "llama"), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["refreshed", "white"])
def test_each_kind_of_pass_that_is_looked_at_compiles_once(case):
    """One without sketches, one for either side of a refresh's, or one in which second moments are looked at."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    config, kinds = {"refreshed": ({"refresh": 4}, 3), "white": ({"coordinates": "white"}, 2)}[case]
    config = ScaLoraConfig(interval=None, **config)
    model, twin = (models.lora("llama", torch.float64, r=2) for _ in range(2))
    optimizer, plain = (torch.optim.SGD(models.trainable(m), lr=0.1) for m in (model, twin))
    compiled = torch.compile(model, backend="aot_eager")
    for each, own in ((model, optimizer), (twin, plain)):
        scalora.attach(each, own, config)
    for step in range(14):  # two looks, three refreshes
        models.train(compiled, optimizer, "llama", 1, start=step)
        models.train(twin, plain, "llama", 1, start=step)
    assert counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]
    torch.testing.assert_close(models.logits(model, "llama"), models.logits(twin, "llama"))
    torch._dynamo.reset()
