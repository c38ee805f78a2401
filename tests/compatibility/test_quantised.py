"""Quantised bases, as transformers loads them: accumulated columns beside them, never the dense merge into them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import scalora
from helpers import models
from helpers.attached import run
from scalora import ScaLoraConfig, ScaloraError
from scalora.algebra.nf4 import from_nf4, to_nf4


def _torchao(name):
    return TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)())


# What quantises activations too turns a rounding of the sum into a step of its own.
QUANTISED = {
    "bitsandbytes-4bit": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        1e-5,
    ),
    "bitsandbytes-8bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), 5e-3),
    "torchao-int8": ("torchao", lambda: _torchao("Int8WeightOnlyConfig"), 1e-5),
    "torchao-int8-dynamic": ("torchao", lambda: _torchao("Int8DynamicActivationInt8WeightConfig"), 5e-3),
    "torchao-float8": ("torchao", lambda: _torchao("Float8WeightOnlyConfig"), 1e-5),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_base(case, tmp_path):
    library, config, tolerance = QUANTISED[case]
    pytest.importorskip(library)
    # bitsandbytes counts in blocks of 64
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=models.VOCABULARY, **sizes)).save_pretrained(tmp_path)

    def load():
        model = LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=config(), dtype=torch.float32, device_map="cpu"
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # in eval mode it would repack the weights, for good
        return model

    torch.manual_seed(2)
    model = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=models.TARGETS["llama"]))
    optimizer = torch.optim.AdamW(models.trainable(model), lr=3e-3)
    with pytest.raises(ScaloraError, match=r"quantised or not an ordinary matrix.*choose accumulate='adapter'"):
        scalora.attach(model, optimizer, ScaLoraConfig(accumulate="base"))
    handle = run(model, optimizer, tolerance=tolerance)
    handle.load_state_dict(handle.state_dict())
    many = torch.randint(0, models.VOCABULARY, (16, 24))  # beside an ordinary weight the sum would be cheaper
    with torch.no_grad():
        one_by_one = torch.cat([model(input_ids=ids[None]).logits for ids in many])
        torch.testing.assert_close(model(input_ids=many).logits, one_by_one, rtol=0, atol=tolerance)
    if "dynamic" not in case:  # under autocast gradients end at its layers, with plain PEFT too
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=many, labels=many).loss.backward()
        assert all(p.grad.isfinite().all() for p in models.trainable(model))
    path = scalora.save_plain_lora(model, tmp_path / "plain")
    again = PeftModel.from_pretrained(load(), path)
    torch.testing.assert_close(models.logits(again, "llama"), models.logits(model, "llama"), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(64, 64), (256, 192), (100, 128)])
def test_our_nf4_is_bitsandbytes_double_quantised_one(shape):
    """Rows of whole blocks: of others its dequantising on CPUs mixes up the scales. Ours takes the nearer level."""
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(shape) * torch.rand(shape[0], 1)
    packed, state = functional.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = to_nf4(W)
    assert torch.equal(ours.codes, packed.flatten())
    same = ours.scales == state.absmax
    assert same.float().mean() > 0.99
    blocks = same.repeat_interleave(64).view(shape)
    theirs = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(from_nf4(ours, W)[blocks], theirs[blocks], rtol=1e-6, atol=1e-7)
