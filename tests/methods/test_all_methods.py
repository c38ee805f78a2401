"""Every method by its name: adapts, learns, is measured, is saved, and comes back by the lines it prints."""

import math

import pytest
import torch
from transformers import set_seed, trainer_pt_utils

from helpers import models, training
from scalora import ScaloraError
from scalora.methods import MethodSpec, all_methods, build_method
from scalora.methods.peft_any import peft_types

NAMED = {
    "lora", "rslora", "dora", "pissa", "full", "scalora", "scalora-i", "scalora-nonnegative", "scalora-scalar",
    "scalora-normalize", "scalora-refresh", "scalora-oracle", "relora", "mora", "hira", "lora-ga", "alpha-lora",
    "white-lora", "white-scalora", "white-refresh", "lora+", "lora-fa", "lora-muon", "riemannian",
    "loft", "lora-pro", "lora-rite",
    "reflora", "reflora-s", "balora", "stable-lora", "polar",
    "apollo-mini", "fira", "flora", "loftq",
}  # fmt: skip
FROM_PEFT = {
    "peft:LOHA": {}, "peft:LOKR": {}, "peft:FOURIERFT": {"n_frequency": 40}, "peft:RANDLORA": {}, "peft:VERA": {},
    "peft:BOFT": {}, "peft:MISS": {}, "peft:OFT": {"oft_block_size": 0}, "peft:ADALORA": {"total_step": 6},
    "peft:LORA": {"use_dora": True}, "peft:OSF": {}, "peft:SHIRA": {},
    "peft:GRALORA": {}, "peft:DELORA": {},
}  # fmt: skip
OPTIONS = {**FROM_PEFT, "scalora-refresh": {"refresh": 2}, "white-refresh": {"refresh": 2}}
RESUMED = [
    "relora", "lora-ga", "scalora-oracle", "mora", "alpha-lora", "full", "pissa", "dora",
    "lora+", "lora-fa", "lora-muon", "riemannian", "loft", "lora-pro", "lora-rite",
    "reflora", "reflora-s", "balora", "stable-lora", "polar",
    "apollo-mini", "fira", "flora", "loftq",
]  # fmt: skip
LOSSY_START = {"peft:FOURIERFT", "loftq"}  # PEFT's FourierFT starts at a random update; LoftQ quantises the base


def test_the_names_are_those_of_the_arena():
    assert set(all_methods()) >= NAMED


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("name", [*sorted(NAMED), *FROM_PEFT])
def test_a_method_from_adapting_to_loading(name, kind, tmp_path):
    before = models.logits(training.base(kind, tmp_path / "base"), kind)
    adapted = training.adapt(name, kind, tmp_path / "base", options=OPTIONS.get(name, {}))
    if name not in LOSSY_START and kind == "llama":  # bert's head, trained too, starts at random elsewhere
        torch.testing.assert_close(models.logits(adapted.model, kind), before, rtol=0, atol=1e-5)

    made = training.trainer(adapted, kind, tmp_path / "out", learning_rate=5e-3)
    made.train()
    losses = training.losses(made)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] <= losses[0]

    after = models.logits(adapted.model, kind)
    assert not torch.equal(after, before)
    spectra = dict(adapted.spectra())
    assert spectra
    for sigma, m, n in spectra.values():
        assert sigma.isfinite().all()
        assert (sigma.diff() <= 0).all()
        assert 0 < len(sigma) <= min(m, n)
    assert torch.equal(models.logits(adapted.model, kind), after), "measuring must not change the model"

    lines = adapted.save(tmp_path / "adapter")
    assert torch.equal(models.logits(adapted.model, kind), after), "saving must not change the model"
    torch.testing.assert_close(models.logits(training.run_lines(lines), kind), after, rtol=0, atol=1e-5)


def _orders(name, folder):
    """The orders of the rows that a run of two epochs draws."""
    seen = []

    def spy(*arguments, grouped=trainer_pt_utils.get_length_grouped_indices, **options):
        seen.append(grouped(*arguments, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_pt_utils, "get_length_grouped_indices", spy)
        adapted = training.adapt(name, "llama", folder / "base", options=OPTIONS.get(name, {}))
        training.trainer(
            adapted, "llama", folder / "out", train_sampling_strategy="group_by_length", max_steps=7
        ).train()
    return seen


@pytest.fixture(scope="module")
def orders_of_lora(tmp_path_factory):
    return _orders("lora", tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("name", sorted(NAMED - {"lora", "alpha-lora"}))  # alpha-lora sets rows apart
def test_every_method_sees_the_data_in_the_order_of_plain_lora(name, tmp_path, orders_of_lora):
    assert len(orders_of_lora) == 2  # epochs
    assert _orders(name, tmp_path) == orders_of_lora


@pytest.mark.parametrize("name", sorted(NAMED))
def test_the_classification_head_is_trained_too(name, tmp_path):
    adapted = training.adapt(name, "bert", tmp_path / "base")
    assert any("classifier" in n for n, p in adapted.model.named_parameters() if p.requires_grad)
    base = [n for n, p in adapted.model.named_parameters() if p.requires_grad and "embeddings" in n]
    assert not base


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(name, kind, tmp_path):
    often = ("relora", "alpha-lora", "apollo-mini", "fira", "flora")
    options = {"scalora-oracle": {"interval": 2}, **{each: {"every": 2} for each in often}}.get(name, {})
    outputs = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-3")):
        adapted = training.adapt(name, kind, tmp_path / "base", options=options)
        set_seed(5)
        made = training.trainer(
            adapted, kind, tmp_path / "out", save_strategy="steps", save_steps=3, learning_rate=5e-3
        )
        made.train(resume_from_checkpoint=resume)
        outputs.append(models.logits(adapted.model, kind))
    # A store that is taken over recompresses at its first event, which rounds.
    atol = 1e-5 if name in ("relora", "scalora-oracle") else 0
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=atol)


GPT2 = ["lora", "relora", "lora-ga", "full", "hira", "dora", "rslora", "lora-fa", "lora-muon", "fira", "flora", "loftq"]


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_with_its_transposed_weights(name, tmp_path):
    adapted = training.adapt(name, "gpt2", tmp_path / "base")
    made = training.trainer(adapted, "gpt2", tmp_path / "out", learning_rate=5e-3)
    made.train()
    assert training.losses(made)[-1] <= training.losses(made)[0]
    lines = adapted.save(tmp_path / "adapter")
    after = models.logits(adapted.model, "gpt2")
    torch.testing.assert_close(models.logits(training.run_lines(lines), "gpt2"), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mora", "alpha-lora"])
def test_own_layers_refuse_transposed_weights(name, tmp_path):
    with pytest.raises(ScaloraError, match="Conv1D"):
        training.adapt(name, "gpt2", tmp_path / "base")


@pytest.mark.parametrize("name", ["mora", "full", "alpha-lora", "hira", "dora", "relora"])
def test_modules_that_are_not_there(name, tmp_path):
    with pytest.raises(ScaloraError, match=r"target_modules.*q_proj"):
        training.adapt(name, "llama", tmp_path / "base", target_modules=["nothing"])


@pytest.mark.parametrize("name", ["mora", "full", "alpha-lora", "lora", "hira"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_all_linear_means_the_same_everywhere(name, kind, tmp_path):
    adapted = training.adapt(name, kind, tmp_path / "base", target_modules="all-linear", rank=1)
    count = {"llama": 14, "bert": 13}[kind]  # 7 per decoder layer; 6 per encoder layer and the pooler
    assert len(list(adapted.spectra())) == count


@pytest.mark.parametrize("name", ["lora-ga", "scalora-oracle"])
def test_two_ranks_must_fit(name, tmp_path):
    with pytest.raises(ScaloraError, match="choose 8 or less"):
        training.adapt(name, "llama", tmp_path / "base", rank=10)


def test_full_refuses_half_precision():
    model = models.base("llama", torch.bfloat16)
    with pytest.raises(ScaloraError, match=r"bfloat16.*float32"):
        training.method("full").adapt(model, "causal-lm")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("peft:LOHAA", "did you mean peft:LOHA"),
        ("peft:PROMPT_TUNING", "PEFT has, but it is not supported"),
        ("peft:PREFIX_TUNING", "PEFT has, but it is not supported"),
        ("peft:SOMETHING", "no method of this PEFT that adapts weights"),
        ("peft:lily", "refused: .*depends on the other rows"),
        ("relorra", "did you mean 'relora'"),
        ("xyzzy", "peft:<TYPE>"),
    ],
)
def test_unknown_names_say_what_is_known(name, message):
    with pytest.raises(ScaloraError, match=message):
        build_method(MethodSpec(name=name))


@pytest.mark.parametrize(
    ("name", "options"),
    [("relora", {"evry": 3}), ("mora", {"type": 2}), ("peft:LOHA", {"rank": 3}), ("alpha-lora", {"share": 2})],
)
def test_wrong_options_are_named(name, options):
    with pytest.raises(ScaloraError, match=next(iter(options))):
        build_method(MethodSpec(name=name, options=options))


def test_what_peft_refuses_is_told_in_one_line(tmp_path):
    with pytest.raises(ScaloraError, match="n_frequency"):
        training.adapt("peft:FOURIERFT", "llama", tmp_path / "base", options={"n_frequency": 10**9})


def test_the_recipe_reaches_peft(tmp_path):
    adapted = training.adapt("peft:loha", "llama", tmp_path / "base", rank=3, alpha=5.0, dropout=0.25)
    config = adapted.model.peft_config["default"]
    assert (config.r, config.alpha, config.module_dropout) == (3, 5.0, 0.25)


@pytest.mark.parametrize("kind", ["ADALORA", "SUPERTUNING"])
def test_dropout_reaches_what_calls_it_as_lora_does(kind):
    assert build_method(MethodSpec(name=f"peft:{kind}", dropout=0.25)).fields["lora_dropout"] == 0.25
    assert "lora_dropout" not in build_method(MethodSpec(name=f"peft:{kind}")).fields


@pytest.mark.parametrize(
    ("start", "way_out"), [("pissa_niter_4", r"method pissa with options \{iterations: 4\}"), ("eva", "choose another")]
)
def test_a_start_that_a_saved_adapter_could_not_have_is_refused(start, way_out):
    with pytest.raises(ScaloraError, match=rf"init_lora_weights of peft:LORA is '{start}'.*{way_out}"):
        build_method(MethodSpec(name="peft:LORA", options={"init_lora_weights": start}))


def test_every_option_is_described():
    for name, cls in all_methods().items():
        assert all(field.description for field in cls.Options.model_fields.values()), name


def test_prompts_are_not_listed():
    assert "LOHA" in peft_types()
    assert not {"PROMPT_TUNING", "PREFIX_TUNING", "POLY", "LILY"} & set(peft_types())


def test_the_command_line_lists_them_all():
    typer_testing = pytest.importorskip("typer.testing")
    from scalora.cli import app

    printed = typer_testing.CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"}).stdout
    assert all(name in printed for name in [*NAMED, "peft:<TYPE>", "FOURIERFT"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"floor": 2}, r"^method\.options\.floor is 2: "),
        ({"capacity": 3, "accumulate": "base"}, r"^method\.options\.capacity is 3 "),
        ({"intervall": 3}, r"^method\.options\.intervall: scalora-i has no such option; did you mean 'interval'\?"),
        ({"foo": 3}, r"^method\.options\.foo: scalora-i has no such option \(its options: interval, "),
    ],
)
def test_an_option_is_named_as_a_recipe_has_it(options, words):
    with pytest.raises(ScaloraError, match=words):
        build_method(MethodSpec(name="scalora-i", options=options))
