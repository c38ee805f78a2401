"""Tiny models of many families, each made from its own config, with LoRA on all that can carry it; and their table.

``PYTHONPATH=src:tests python -m helpers.families`` writes the table into docs/compatibility.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from scalora.common.files import write_text
from scalora.layers.peft_lora import AdapterLayer, sort_layers

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
ROWS, TOKENS, WORDS, WIDTH = 8, 12, 64, 16
_IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3}
_LAYERS = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_LAYERS, **_TEXT, "num_key_value_heads": 1}
_EXPERTS = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}  # fmt: skip
Batch = dict[str, Tensor]


def _ids(seed: int, low: int = 3) -> Tensor:
    return torch.randint(low, WORDS, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))


def _values(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(7))


def _text() -> Batch:
    return {"input_ids": _ids(1), "labels": _ids(1)}


def _pairs() -> Batch:
    return {"input_ids": _ids(1), "labels": _ids(2)}


def _classes() -> Tensor:
    return torch.arange(ROWS) % 3


def _labelled() -> Batch:
    return {"input_ids": _ids(1), "labels": _classes()}


def _images() -> Batch:
    return {"pixel_values": _values(3, 8, 8), "labels": _classes()}


def _speech() -> Batch:
    return {"input_features": _values(8, 20), "labels": _ids(2)}


def _captioned() -> Batch:
    ids = _ids(1)
    return {"input_ids": ids, "pixel_values": _values(3, 8, 8)}


def _image_and_text() -> Batch:
    ids = _ids(1, low=5)
    ids[:, 1:5] = 4  # where the image's four tokens go
    return {"input_ids": ids, "labels": ids, "pixel_values": _values(3, 8, 8), "token_type_ids": (ids == 4).long()}


def _noisy() -> Batch:
    return {
        "sample": _values(3, 8, 8), "timestep": torch.arange(ROWS), "encoder_hidden_states": _values(5, 8),
        "labels": _values(3, 8, 8).flip(0),
    }  # fmt: skip


class _Captions(nn.Module):
    """CLIP with its contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        text = {**_LAYERS, **_TEXT, "max_position_embeddings": TOKENS}
        config = transformers.CLIPConfig(
            text_config=text,  # pyright: ignore
            vision_config={**_LAYERS, **_IMAGE},  # pyright: ignore
            projection_dim=WIDTH,
        )
        self.clip = transformers.CLIPModel(config)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        out = self.clip(input_ids=input_ids, pixel_values=pixel_values, return_loss=True)
        return {"loss": out.loss, "logits": out.logits_per_image / self.clip.logit_scale.exp()}  # cosines


class _Denoiser(nn.Module):
    """A UNet with the loss that diffusion trains it by."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel  # pyright: ignore[reportMissingImports]

        self.unet = UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
        )  # fmt: skip

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        out = self.unet(sample, timestep, encoder_hidden_states).sample
        return {"loss": (out - labels).square().mean(), "logits": out}


@dataclass
class Family:
    """How a tiny model is made, what of it is adapted, and a batch that trains it."""

    model: str  # its class
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch] = _text
    lora: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})
    needs: str = "transformers"  # to be made

    def base(self) -> nn.Module:
        torch.manual_seed(1)
        return self.make()

    def adapted(self) -> PeftModel:
        base = self.base()
        torch.manual_seed(2)
        return get_peft_model(base, LoraConfig(r=2, lora_alpha=4, **self.lora))  # pyright: ignore

    def rows(self) -> list[Batch]:
        batch = self.batch()
        return [{name: values[i] for name, values in batch.items()} for i in range(ROWS)]

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        training = model.training
        found = model.eval()(**self.batch())["logits"]
        model.train(training)
        return found


def _of(name: str, batch: Callable[[], Batch] = _text, targets: Any = "all-linear", **config: Any) -> Family:
    """By the names of transformers' classes: <name>Config beside the model's."""

    def make() -> nn.Module:
        cls = getattr(transformers, name)
        return cls(cls.config_class(**config))

    lora = dict(targets) if isinstance(targets, Mapping) else {"target_modules": targets}
    return Family(name, make, batch, lora)


def _gemma_3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config={**_GROUPED, "head_dim": 8, "sliding_window": 8},  # pyright: ignore
        vision_config={**_LAYERS, **_IMAGE, "vision_use_head": False},  # pyright: ignore
        mm_tokens_per_image=4, image_token_id=4, boi_token_id=3, eoi_token_id=3,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # zeros let no gradient pass
    return model


_HEADS = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2}
FAMILIES = {
    "llama": _of("LlamaForCausalLM", **_GROUPED),
    "qwen3": _of("Qwen3ForCausalLM", head_dim=8, **_GROUPED),
    "gemma3-text": _of("Gemma3ForCausalLM", head_dim=8, sliding_window=8, **_GROUPED),
    "gemma3": Family("Gemma3ForConditionalGeneration", _gemma_3, _image_and_text),
    "phi": _of("PhiForCausalLM", **_LAYERS, **_TEXT),
    "gpt2": _of("GPT2LMHeadModel", n_positions=TOKENS, **_HEADS, **_TEXT,
                targets={"target_modules": ["wte", "c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt-neox": _of("GPTNeoXForCausalLM", **_LAYERS, **_TEXT),
    "bloom": _of("BloomForCausalLM", hidden_size=WIDTH, n_layer=2, n_head=2, **_TEXT),
    "mamba2": _of("Mamba2ForCausalLM", hidden_size=WIDTH, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1,
                  state_size=8, chunk_size=4, targets=["embeddings", "in_proj"], **_TEXT),
    "rwkv": _of("RwkvForCausalLM", hidden_size=WIDTH, attention_hidden_size=WIDTH, num_hidden_layers=2,
                context_length=TOKENS, **_TEXT),
    "recurrent-gemma": _of("RecurrentGemmaForCausalLM", **_GROUPED, lru_width=WIDTH, attention_window_size=8,
                           block_types=("recurrent", "attention")),
    "mixtral": _of("MixtralForCausalLM", num_local_experts=4, targets=_EXPERTS, **_GROUPED),
    "qwen3-moe": _of("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8,
                     targets=_EXPERTS, **_GROUPED),
    "gpt-oss": _of("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=8, targets=_EXPERTS,
                   **_GROUPED),
    "t5": _of("T5ForConditionalGeneration", _pairs, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
              decoder_start_token_id=0, **_TEXT),
    "bart": _of("BartForConditionalGeneration", _pairs, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                max_position_embeddings=TOKENS, **_TEXT),
    "whisper": _of("WhisperForConditionalGeneration", _speech, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
                   encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                   num_mel_bins=8, max_source_positions=10, max_target_positions=TOKENS, decoder_start_token_id=1,
                   **_TEXT),
    "vit": _of("ViTForImageClassification", _images, num_labels=3, **_LAYERS, **_IMAGE,
               targets={"target_modules": ["projection", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
                        "modules_to_save": ["classifier"]}),
    "clip": Family("CLIPModel", _Captions, _captioned, {"target_modules": [
        "token_embedding", "patch_embedding", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2",
        "text_projection", "visual_projection"]}),
    "deberta": _of("DebertaV2ForSequenceClassification", _labelled, num_labels=3, relative_attention=True,
                   pos_att_type=["p2c", "c2p"], targets={"target_modules": "all-linear", "task_type": "SEQ_CLS"},
                   **_LAYERS, **_TEXT),
    "unet": Family("UNet2DConditionModel", _Denoiser, _noisy, {"target_modules": [
        "conv_in", "conv1", "conv2", "conv_shortcut", "to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2"]},
        needs="diffusers"),
}  # fmt: skip


def _kind(layer: AdapterLayer) -> str:
    """Its class; of experts the parameter's name."""
    parameter = getattr(layer.module, "parameter_name", None)
    return f"`{parameter}` of {layer.experts} experts" if parameter else type(layer.base).__name__


def table(former: str = "") -> str:
    """Each family, and what of it is rescaled; rows of ``former`` where its library is not installed."""
    known = {found[1]: line for line in former.splitlines() if (found := re.search(r"\[([\w-]+)\]` \|$", line))}
    lines = ["| class | its layers that are rescaled | test |", "|---|---|---|"]
    for name, family in FAMILIES.items():
        if find_spec(family.needs) is None:
            lines.append(known.get(name, f"| `{family.model}` | not made: {family.needs} is not installed | |"))
            continue
        layers, left = sort_layers(family.adapted())
        assert not left, (name, left)
        kinds = Counter(_kind(layer) for layer in layers)
        what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        test = f"test_families.py::test_trained_saved_and_loaded[{name}]"
        lines.append(f"| `{family.model}` | {what} | `{test}` |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table as it should be."""
    before, begin, rest = page.partition(BEGIN)
    former, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} has no place for the table")
    return f"{before}{begin}\n\n{table(former)}\n\n{end}{after}"


if __name__ == "__main__":
    write_text(PAGE, written(PAGE.read_text(encoding="utf-8")))
