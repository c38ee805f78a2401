"""To PEFT there is one adapter: its folders, merges, switches and sums hold the whole function."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

import scalora
from helpers.zoo import KINDS, adamw, same
from scalora import ScaLoraConfig, ScaloraError

pytestmark = pytest.mark.filterwarnings("ignore")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def lived():
    """Each kind's trained model, its function, and that of its base; for tests that copy it."""
    made = {}

    def give(name):
        if name not in made:
            model, _, _ = KINDS[name].trained()
            made[name] = model, KINDS[name].output(model), KINDS[name].output(KINDS[name].base())
        return made[name]

    return give


# Property 1: plain PEFT loads the trained function from whatever writes a folder.


def _by_hand(model, folder):
    folder.mkdir()
    state = {name: tensor.contiguous().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(str(folder))


WRITERS = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "state_dict": lambda model, folder: model.save_pretrained(folder, state_dict=model.state_dict()),
    "trained-only": lambda model, folder: model.save_pretrained(
        folder, state_dict={n: p for n, p in model.named_parameters() if p.requires_grad}
    ),
    "by-hand": _by_hand,
    "plain-lora": scalora.save_plain_lora,
}


@every_kind
@pytest.mark.parametrize("way", WRITERS)
def test_plain_peft_loads_the_trained_function(kind, way, lived, tmp_path):
    model, expected, _ = lived(kind)
    WRITERS[way](model, tmp_path / "adapter")
    same(KINDS[kind].output(model), expected)
    again = PeftModel.from_pretrained(KINDS[kind].base(), str(tmp_path / "adapter"))
    same(KINDS[kind].output(again), expected)


# Property 2: the function is right whatever is done to the model.


def _merged(model, **options):
    model.merge_adapter(**options)


def _merged_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def _disabled_and_back(model):
    with model.disable_adapter():
        pass
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def _another_and_back(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=_targets(model), init_lora_weights=False))
    model.set_adapter("other")
    model.set_adapter("default")
    model.delete_adapter("other")


def _targets(model):
    config = model.peft_config["default"]
    saved = config.modules_to_save or []
    return [
        n.split("base_model.model.", 1)[1] for n, m in model.named_modules()
        if "default" in getattr(m, "lora_A", ()) and n.rsplit(".", 1)[-1] not in saved
    ]  # fmt: skip


CHANGES = {
    "merged": _merged,
    "merged-safely": lambda model: _merged(model, safe_merge=True),
    "merged-by-name": lambda model: _merged(model, adapter_names=["default"]),
    "merged-and-back": _merged_and_back,
    "off-and-on": _disabled_and_back,
    "another-and-back": _another_and_back,
    "half-and-back": lambda model: model.double(),
}


MERGED = [kind for kind in KINDS if kind != "tied"]  # PEFT itself would merge into the embeddings too, and warns


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("way", CHANGES)
def test_the_function_stays(kind, way, lived):
    model, expected, _ = lived(kind)
    changed = copy.deepcopy(model)
    if way == "another-and-back" and kind in ("token indices", "attention"):
        pytest.skip("PEFT itself has no second adapter there")
    CHANGES[way](changed)
    inputs = {n: t.double() if t.is_floating_point() and way == "half-and-back" else t
              for n, t in KINDS[kind].inputs.items()}  # fmt: skip
    with torch.no_grad():
        out = changed(inputs["x"]) if "x" in inputs else changed(**inputs).logits
    same(out.float(), expected)


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("options", [{}, {"safe_merge": True}, {"adapter_names": ["default"]}])
def test_a_merged_model_is_a_plain_one(kind, options, lived):
    model, expected, _ = lived(kind)
    merged = copy.deepcopy(model).merge_and_unload(**options)
    assert not any("lora" in name or "accumulated" in name for name, _ in merged.named_parameters())
    same(KINDS[kind].output(merged), expected)


@every_kind
def test_switched_off_it_is_the_base(kind, lived):
    model, expected, base = lived(kind)
    with model.disable_adapter():
        same(KINDS[kind].output(model), base, 1e-6 if kind == "attention" else 0)  # where PEFT merges for each pass
    same(KINDS[kind].output(model), expected)
    if not (model.peft_config["default"].modules_to_save):  # which stay
        same(KINDS[kind].output(copy.deepcopy(model).unload()), base, 1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "names alike", "patterns", "tied"])
def test_rows_of_one_batch_may_ask_for_different_adapters(kind, lived):
    model, expected, base = lived(kind)
    model = copy.deepcopy(model)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    out = KINDS[kind].output(model, adapter_names=["default", "__base__", "default", "__base__"])
    same(out[::2], expected[::2])
    same(out[1::2], base[1::2])


# Sums of adapters, and scales.

SUMS = {"cat": 1e-5, "svd": 1e-4}  # and how exact they are


@pytest.mark.parametrize("kind", ["llama", "gpt2", "names alike", "patterns", "tied"])
@pytest.mark.parametrize("way", SUMS)
@pytest.mark.parametrize("weights", [[1.0], [0.5, 2.0]])
def test_weighted_sums_are_sums_of_whole_updates(kind, way, weights, lived, tmp_path):
    model, _, _ = lived(kind)
    whole = scalora.save_plain_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(KINDS[kind].base(), str(whole))
    ours, outputs = copy.deepcopy(model), []
    for each in (ours, plain):
        torch.manual_seed(8)
        second = LoraConfig(r=2, target_modules=_targets(each), init_lora_weights=False)
        each.add_adapter("other", second)
        rank = {"svd_rank": 4 if kind == "names alike" else 16} if way == "svd" else {}
        names = ["default", "other"][: len(weights)]
        each.base_model.add_weighted_adapter(names, weights, "sum", combination_type=way, **rank)
        each.set_adapter("sum")
        outputs.append(KINDS[kind].output(each))
    same(outputs[0], outputs[1], SUMS[way])
    ours.set_adapter("default")
    same(KINDS[kind].output(ours), lived(kind)[1])
    with pytest.raises(ValueError, match="same r value"):  # all columns count
        ours.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mean", combination_type="linear")


@every_kind
def test_a_scale_scales_the_whole_update(kind, lived):
    model, expected, _ = lived(kind)
    plain = copy.deepcopy(model)
    with rescale_adapter_scale(model, 0.5):
        half = KINDS[kind].output(model)
        if kind in MERGED:
            same(half, KINDS[kind].output(copy.deepcopy(model).merge_and_unload()))
    same(KINDS[kind].output(model), expected)
    assert not torch.allclose(half, expected, atol=1e-5)
    for layer in plain.modules():
        if "default" in getattr(layer, "lora_A", ()):
            layer.scale_layer(0.5)
    same(KINDS[kind].output(plain), half)


# Loading into it.


@every_kind
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_carries_all_columns(kind, strict, lived):
    model, expected, _ = lived(kind)
    other = KINDS[kind].adapted()
    optimizer = adamw(other)
    scalora.attach(other, optimizer, ScaLoraConfig(interval=1))
    for _ in range(3):
        KINDS[kind].step(other, optimizer)
    other.load_state_dict(model.state_dict(), strict=strict)
    same(KINDS[kind].output(other), expected)


@every_kind
def test_a_folder_takes_the_place_of_what_an_attached_model_holds(kind, lived, tmp_path):
    model, expected, _ = lived(kind)
    model.save_pretrained(tmp_path)
    other, optimizer, _ = KINDS[kind].trained(3)
    other.load_adapter(str(tmp_path), "default", is_trainable=True)
    same(KINDS[kind].output(other), expected)
    KINDS[kind].step(other, optimizer)  # and it is trained on
    assert not torch.equal(KINDS[kind].output(other), expected)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "vit", "patterns", "resized"])
def test_a_folder_that_does_not_fit_changes_nothing(kind, tmp_path):
    """Some layers of it would fit, and heads."""
    kind = KINDS[kind]
    smaller = kind.adapted(r=1, lora_alpha=kind.lora.get("lora_alpha", 4) / 2, init_lora_weights=False)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter += 0.1 if parameter.requires_grad else 0.0
    smaller.save_pretrained(tmp_path)
    model, optimizer, _ = kind.trained()
    expected = kind.output(model)
    with pytest.raises((ScaloraError, RuntimeError), match=r"size mismatch|was saved with scale"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    same(kind.output(model), expected, 0)
    kind.step(model, optimizer)


@every_kind
def test_a_deleted_adapter_leaves_no_trace(kind, lived):
    model = copy.deepcopy(lived(kind)[0])  # a copy is watched
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name, value in (vars(layer) | layer._modules).items():
            if isinstance(value, (dict, torch.nn.ModuleDict, torch.nn.ParameterDict)):
                assert "default" not in value, name


def test_a_configuration_given_to_another_model_says_that_models_ranks(lived, tmp_path):
    model = lived("llama")[0]
    other = get_peft_model(KINDS["llama"].base(), model.peft_config["default"])
    other.save_pretrained(tmp_path / "other")
    again = PeftModel.from_pretrained(KINDS["llama"].base(), tmp_path / "other")
    same(KINDS["llama"].output(again), KINDS["llama"].output(other), 0)
    model.save_pretrained(tmp_path / "other")  # over it
    again = PeftModel.from_pretrained(KINDS["llama"].base(), tmp_path / "other")
    same(KINDS["llama"].output(again), KINDS["llama"].output(model))


def test_another_adapters_folder_holds_no_state_of_the_trained_one(tmp_path):
    kind = KINDS["llama"]
    model, optimizer, _ = kind.trained()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    kind.step(model, optimizer)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not list(tmp_path.rglob("scalora.safetensors"))


@pytest.mark.parametrize("accumulate", ["adapter", "base"])
def test_the_adapter_alone_of_a_written_base_is_taken_by_no_model(accumulate):
    kind = KINDS["llama"]
    model, _, _ = kind.trained(accumulate="base")
    alone = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    by_peft = get_peft_model_state_dict(model)
    other, _, _ = kind.trained(accumulate=accumulate)
    expected = kind.output(other)
    for load in (
        lambda: other.load_state_dict(alone, strict=False),
        lambda: set_peft_model_state_dict(other, by_peft),
        lambda: model.load_state_dict(alone, strict=False),  # of another time, perhaps
    ):
        with pytest.raises(ScaloraError, match="the adapter alone of a model whose base weights hold"):
            load()
    same(kind.output(other), expected, 0)
