"""Scores and texts do not depend on the batch, whatever a model makes of padding."""

import pytest
import torch
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from helpers import tokenized
from scalora.tasks.completion import token_logprobs
from scalora.tasks.generation import generate

SMALL = {"vocab_size": tokenized.SIZE, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "intermediate_size": 32}


class _Padded(torch.nn.Module):
    """Adds the mean of what came before: no mask reaches this layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, ids):
        found = self.layer(ids)
        return found + found.cumsum(1) / torch.arange(1, found.shape[1] + 1)[:, None]


def _leaking():
    model = tokenized.llama()
    model.model.embed_tokens = _Padded(model.model.embed_tokens)
    return model


# Whether rows may share a batch.
MODELS = {
    "llama": (tokenized.llama, True),
    "gpt2": (tokenized.gpt2, True),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4, time_step_rank=2)), True),
    "rwkv": (lambda: RwkvForCausalLM(RwkvConfig(**SMALL, attention_hidden_size=16)), False),
    "recurrent gemma": (
        lambda: RecurrentGemmaForCausalLM(
            RecurrentGemmaConfig(**{**SMALL, "num_hidden_layers": 3}, **HEADS, head_dim=8, lru_width=16)
        ),
        False,
    ),
    # Counts positions from 2 by itself, as in training: not from 0, as it would be told.
    "roberta": (lambda: RobertaForCausalLM(RobertaConfig(**SMALL, **HEADS, is_decoder=True)), False),
    "leaking": (_leaking, False),
}


def _made(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _pairs(lengths=(5, 9, 7, 30)):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, tokenized.SIZE, (n,), generator=generator).tolist() for n in lengths]
    return [(row[:-3], row[-3:]) for row in rows]


def _rows_of_last_call(model, call):
    rows = []
    hook = model.register_forward_pre_hook(lambda _m, _a, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    try:
        return call(), rows[-1]
    finally:
        hook.remove()


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_scored_as_it_is_alone(name):
    model, tokenizer, pairs = _made(name), tokenized.tokenizer(), _pairs()
    options = {"autocast": None, "progress": None}
    found, rows = _rows_of_last_call(model, lambda: token_logprobs(model, tokenizer, pairs, batch_size=4, **options))
    assert rows == (4 if MODELS[name][1] else 1)
    for (prompt, following), logprobs in zip(pairs, found, strict=True):
        with torch.no_grad():  # as in training: nothing but the ids
            alone = model(torch.tensor([prompt + following])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = alone.gather(-1, torch.tensor(following)[:, None])[:, 0]
        torch.testing.assert_close(logprobs, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "rwkv", "leaking"])
def test_a_prompt_is_written_on_as_it_is_alone(name):
    model, tokenizer = _made(name), tokenized.tokenizer()
    prompts = [prompt + following for prompt, following in _pairs()]
    options = {"max_new_tokens": 5, "autocast": None, "progress": None}
    alone = [generate(model, tokenizer, [prompt], batch_size=1, **options)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, batch_size=4, **options) == alone


def test_rows_of_one_length_need_no_probe():
    model, calls = _made("rwkv"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    token_logprobs(model, tokenized.tokenizer(), _pairs((6, 6, 6)), batch_size=4, autocast=None, progress=None)
    assert len(calls) == 1


def test_penalties_of_a_models_own_do_not_count_padding():
    model, tokenizer = _made("llama"), tokenized.tokenizer()
    model.generation_config.repetition_penalty = 5.0
    prompts = [prompt for prompt, _ in _pairs((5, 30))]
    options = {"max_new_tokens": 5, "autocast": None, "progress": None}
    alone = [generate(model, tokenizer, [prompt], batch_size=1, **options)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, batch_size=2, **options) == alone


def test_writing_ends_where_completions_do():
    """The tokenizer's end, which completions are trained with, ends a text even if the model has another."""
    model, tokenizer = tokenized.gpt2().eval(), tokenized.tokenizer()
    model.generation_config.eos_token_id = 5
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = model.transformer.ln_f.bias + 1.0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
    (ids,) = [prompt for prompt, _ in _pairs((5,))]
    lengths = []
    model.register_forward_hook(lambda *_: lengths.append(1))
    assert generate(model, tokenizer, [ids], max_new_tokens=9, batch_size=1, autocast=None, progress=None) == [""]
    assert len(lengths) == 1
