"""Who does not learn the next token is refused by the name of its class; who does is left as it was."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    CpmAntConfig,
    CpmAntForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrOCRConfig,
    TrOCRForCausalLM,
    WhisperConfig,
    WhisperForCausalLM,
)

from helpers import tokenized, workspace
from scalora import ScaloraError
from scalora.runs.loading import load_inputs, made_ready
from scalora.runs.recipe import load_recipe
from scalora.tasks.causality import check_causal
from scalora.tasks.task import Collator, TokenDataset

SIZE = {"vocab_size": tokenized.SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {
    "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_layers": 1,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "vocab_size": tokenized.SIZE, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


class Longer(type(tokenized.gpt2())):
    """Puts a prediction of its own before those of the text."""

    def forward(self, *args, **options):
        found = super().forward(*args, **options)
        found.logits = torch.cat([found.logits[:, :1], found.logits], 1)
        return found


GOOD = {
    "llama": tokenized.llama,
    "gpt2": tokenized.gpt2,
    "bert that looks back": lambda: BertLMHeadModel(BertConfig(**SIZE, intermediate_size=32, is_decoder=True)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=tokenized.SIZE, hidden_size=16, n_layer=2, n_head=2)),
    # Its loss has a term of its own, which the labels do not change.
    "experts": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SIZE, intermediate_size=32, num_key_value_heads=2, num_local_experts=2, output_router_logits=True,
            router_aux_loss_coef=3.0,
        )
    ),
}  # fmt: skip
BAD = {
    "TrOCRForCausalLM does not shift": lambda: TrOCRForCausalLM(TrOCRConfig(**DECODER)),
    "WhisperForCausalLM does not shift": lambda: WhisperForCausalLM(WhisperConfig(**DECODER)),
    "BartForCausalLM does not shift": lambda: BartForCausalLM(BartConfig(**DECODER)),
    "BertLMHeadModel sees the tokens": lambda: BertLMHeadModel(BertConfig(**SIZE, intermediate_size=32)),
    "CpmAntForCausalLM (does not shift|sees|gives|cannot)": lambda: CpmAntForCausalLM(
        CpmAntConfig(vocab_size=tokenized.SIZE, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=32,
                     num_hidden_layers=2, prompt_length=4)
    ),
    "Longer gives 9 predictions for 8 tokens": lambda: Longer(tokenized.gpt2().config),
}  # fmt: skip


def _dataset():
    ids = torch.randint(4, tokenized.SIZE, (4, 7), generator=torch.Generator().manual_seed(0)).tolist()
    return TokenDataset([{"input_ids": row, "labels": row} for row in ids], 0)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_causal_model_is_left_as_it_was(name, autocast):
    torch.manual_seed(0)
    model = GOOD[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert check_causal(model, Collator(0), _dataset(), autocast) == Collator(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("message", BAD)
def test_others_are_refused_by_name(message):
    torch.manual_seed(0)
    with pytest.raises(ScaloraError, match=message):
        check_causal(BAD[message](), Collator(0), _dataset())


def test_a_model_that_does_not_know_shifted_labels_gets_them_all():
    class Plain(type(tokenized.gpt2())):
        def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, shift_labels=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    assert check_causal(tokenized.gpt2(), Collator(0, lean=True), _dataset()).lean
    model = Plain(tokenized.gpt2().config)
    assert check_causal(model, Collator(0, lean=True), _dataset()).lean  # right either way

    class Unaware(Plain):
        def forward(self, labels=None, shift_labels=None, **options):
            return super().forward(labels=shift_labels if shift_labels is not None else labels, **options)

    assert not check_causal(Unaware(tokenized.gpt2().config), Collator(0, lean=True), _dataset()).lean


def test_a_recipe_is_refused_before_anything_is_trained(tmp_path):
    path = workspace.lay(tmp_path)
    torch.manual_seed(0)
    TrOCRForCausalLM(TrOCRConfig(**DECODER)).save_pretrained(tmp_path / "trocr")
    tokenized.tokenizer().save_pretrained(tmp_path / "trocr")
    with pytest.raises(ScaloraError, match="TrOCRForCausalLM does not shift"):
        made_ready(load_inputs(load_recipe(path, [f"model={tmp_path / 'trocr'}"])), None)
