"""A layer's state dict holds all columns as one LoRA, and splits such a one when it is loaded."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers import models
from helpers.attached import attached
from scalora import ScaloraError, save_plain_lora
from scalora.layers.fingerprint import base_fingerprint
from scalora.layers.joined_config import joined_ranks


def _trained(kind="llama", **options):
    model, optimizer, handle = attached(kind, lr=1e-2, **options)
    models.train(model, optimizer, kind, 4)
    return model, optimizer, handle


def test_the_first_columns_are_the_trained_ones_bit_for_bit():
    model, _, handle = _trained()
    state = model.state_dict()
    for layer in handle.layers:
        A, B = (state[f"{layer.name}.lora_{part}.default.weight"] for part in "AB")
        assert A.shape[0] == B.shape[1] == layer.rank + layer.accumulated.used > layer.rank
        assert torch.equal(A[: layer.rank], layer.lora_A)
        assert torch.equal(B[:, : layer.rank], layer.lora_B)
    assert not [name for name in state if ".accumulated." in name]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_state_goes_back_where_it_came_from(kind):
    model, optimizer, handle = _trained(kind)
    then, state = models.logits(model, kind), copy.deepcopy(model.state_dict())
    used = [layer.accumulated.used for layer in handle.layers]
    models.train(model, optimizer, kind, 5)
    model.load_state_dict(state)
    assert torch.equal(models.logits(model, kind), then)
    assert [layer.accumulated.used for layer in handle.layers] == used


def test_a_wider_adapter_of_any_origin_is_taken_whole_and_a_plain_one_clears_what_was_held():
    model, _, handle = _trained()
    wide, narrow = models.lora("llama", r=19, lora_alpha=38, init_lora_weights=False), models.lora("llama")
    for other in (wide, narrow):  # of the same scale
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(models.logits(model, "llama"), models.logits(other, "llama"), rtol=0, atol=1e-6)
    assert {layer.accumulated.used for layer in handle.layers} == {0}


def test_columns_that_do_not_belong_together_are_torchs_own_error():
    model, _, _ = _trained()
    state = model.state_dict()
    name = next(name for name in state if "lora_A" in name)
    state[name] = state[name][:-1]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)


def test_the_state_dict_in_place_of_the_parameters_counts_no_column_twice():
    model, _, _ = _trained()
    expected = models.logits(model, "llama")
    batch = {"input_ids": models.batch("llama")["input_ids"]}
    for values in (model.state_dict(), dict(model.named_parameters())):
        found = torch.func.functional_call(model.eval(), values, (), batch).logits
        assert found.shape == expected.shape
        torch.testing.assert_close(found, model(**batch).logits, rtol=0, atol=1e-5)


def test_what_is_written_says_the_ranks_of_the_whole(tmp_path):
    model, _, handle = _trained(lora={"rank_pattern": {"v_proj": 2}, "use_rslora": True})
    assert model.peft_config["default"].r == 4  # in memory that which is trained
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(models.base("llama"), tmp_path)
    torch.testing.assert_close(models.logits(again, "llama"), models.logits(model, "llama"), rtol=0, atol=1e-6)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {w.shape[0] for name, w in written.items() if "lora_A" in name} == {
        layer.rank + layer.accumulated.used for layer in handle.layers
    }


def test_a_name_that_ends_like_another_has_a_pattern_of_its_own():
    fields = joined_ranks({"fc": (4, 8), "block.fc": (6, 12), "mid": (4, 8)})
    assert (fields["r"], fields["lora_alpha"]) == (4, 8)
    assert fields["rank_pattern"] == {r"^block\.fc": 6}
    assert fields["alpha_pattern"] == {r"^block\.fc": 12}


@pytest.mark.parametrize("how", ["lerp", "copy"])
def test_a_copy_whose_matrices_are_averaged_is_refused(how):
    model, optimizer, _ = _trained()
    teacher = copy.deepcopy(model)
    then = models.logits(teacher, "llama")
    models.train(model, optimizer, "llama", 2)
    assert torch.equal(models.logits(teacher, "llama"), then)
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.5) if how == "lerp" else mine.copy_(theirs)
    for act in (lambda: models.logits(teacher, "llama"), teacher.state_dict, teacher.merge_adapter):
        with pytest.raises(ScaloraError, match="average the merged weights"):
            act()
    teacher.load_state_dict(model.state_dict())
    assert torch.equal(models.logits(teacher, "llama"), models.logits(model, "llama"))


def test_a_copy_may_be_trained_as_plain_lora():
    model, _, _ = _trained()
    other = copy.deepcopy(model)
    then = models.logits(other, "llama")
    models.train(other, torch.optim.AdamW(models.trainable(other), lr=1e-2), "llama", 3)
    moved = (models.logits(other, "llama") - then).abs().max()
    assert 1e-3 < moved < 10
    assert torch.equal(models.logits(model, "llama"), then)


def test_what_is_accumulated_is_no_part_of_the_base():
    model, _, _ = _trained()
    assert base_fingerprint(model) == base_fingerprint(models.lora("llama"))


@pytest.mark.parametrize("detached", [False, True])
def test_averages_put_into_the_model_itself_are_noticed_and_may_be_taken_back(detached):
    """As EMA libraries do for an evaluation: store, copy_to, restore, by .data, whose version nobody counts."""
    model, optimizer, handle = _trained()
    shadow = [p.detach().clone() for p in models.trainable(model)]
    models.train(model, optimizer, "llama", 3)
    then, stored = models.logits(model, "llama"), [p.detach().clone() for p in models.trainable(model)]
    if detached:
        handle.detach()
    for p, average in zip(models.trainable(model), shadow, strict=True):
        p.data.copy_(average)
    with pytest.raises(ScaloraError, match="written to, in a copy or past the attached optimizer"):
        models.logits(model, "llama")
    for p, own in zip(models.trainable(model), stored, strict=True):
        p.data.copy_(own)
    assert torch.equal(models.logits(model, "llama"), then)
    models.train(model, optimizer, "llama", 2)
    models.logits(model, "llama")


def test_a_snapshot_of_what_is_trained_is_refused_and_one_of_everything_is_right():
    model, optimizer, _ = _trained()
    snapshot = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    whole, then = copy.deepcopy(model.state_dict()), models.logits(model, "llama")
    with pytest.raises(ScaloraError, match="trained columns only, but what was moved out of them"):
        model.load_state_dict(snapshot, strict=False)
    assert torch.equal(models.logits(model, "llama"), then)
    models.train(model, optimizer, "llama", 3)
    now = models.logits(model, "llama")
    with pytest.raises(ScaloraError, match="trained columns only"):
        model.load_state_dict(snapshot, strict=False)
    assert torch.equal(models.logits(model, "llama"), now)
    model.load_state_dict(whole)
    assert torch.equal(models.logits(model, "llama"), then)


def test_a_snapshot_of_what_is_trained_is_no_adapter_of_a_written_base():
    model, _, _ = _trained(accumulate="base")
    snapshot = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    then = models.logits(model, "llama")
    with pytest.raises(ScaloraError, match="trained columns only, but what was moved out of them"):
        model.load_state_dict(snapshot, strict=False)
    assert torch.equal(models.logits(model, "llama"), then)


@pytest.mark.parametrize("whole", [True, False])
def test_a_snapshot_of_another_time_is_not_saved_as_the_model_of_now(whole, tmp_path):
    model, optimizer, _ = _trained()
    state = model.state_dict() if whole else dict(model.named_parameters())
    then = {name: tensor.detach().clone() for name, tensor in state.items()}
    models.train(model, optimizer, "llama", 2)
    with pytest.raises(ScaloraError, match=r"state_dict: .* of another time"):
        model.save_pretrained(tmp_path, state_dict=then)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, state_dict=model.state_dict())


def test_another_adapter_of_r_columns_may_be_loaded_by_its_folder(tmp_path):
    other = models.lora("llama", init_lora_weights=False)
    other.save_pretrained(tmp_path)
    model, _, handle = _trained()
    handle.detach()
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(models.logits(model, "llama"), models.logits(other, "llama"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [{}, {"alpha_pattern": {"v_proj": 5}}, {"use_rslora": True}])
def test_a_folder_of_another_scale_does_not_take_an_adapters_place(lora, tmp_path):
    """PEFT would read its matrices, and not their scale."""
    model, _, _ = _trained(lora=lora)
    model.save_pretrained(tmp_path / "own")
    save_plain_lora(model, tmp_path / "plain")  # the same function at scale 1
    other, _, _ = _trained(lora=lora)
    then = models.logits(other, "llama")
    with pytest.raises(ScaloraError, match=r"was saved with scale 1\.0 in layer .*, where adapter 'default' has"):
        other.load_adapter(tmp_path / "plain", "default")
    assert torch.equal(models.logits(other, "llama"), then)
    for place, name in (("own", "default"), ("plain", "another")):
        other.load_adapter(tmp_path / place, name)
        other.set_adapter(name)
        torch.testing.assert_close(models.logits(other, "llama"), models.logits(model, "llama"), rtol=0, atol=1e-6)


USES = {
    "forward": lambda model, folder: torch.no_grad()(models.logits)(model, "llama"),
    "save": lambda model, folder: model.save_pretrained(folder),
    "merge": lambda model, folder: model.merge_and_unload(),
    "state dict": lambda model, folder: model.state_dict(),
    "copy": lambda model, folder: torch.no_grad()(models.logits)(copy.deepcopy(model), "llama"),
}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("use", USES)
def test_what_has_diverged_is_said_to_have_diverged_and_not_to_have_been_written_to(use, value, tmp_path):
    model, optimizer, _ = _trained(optimizer_cls=torch.optim.SGD)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        then = models.logits(model, "llama")
    model(**models.batch("llama")).loss.backward()
    for p in models.trainable(model):
        p.grad.fill_(float(value))
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ScaloraError, match=r"layer \S*q_proj: .* no longer finite: .*diverged.* lower learning rate"):
        USES[use](model, tmp_path)
    model.load_state_dict(state)  # the way out
    with torch.no_grad():
        assert torch.equal(models.logits(model, "llama"), then)
