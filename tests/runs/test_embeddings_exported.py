"""A recipe whose method adapts an embedding too: trained, resumed, exported in every form."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import exports
from scalora import ScaloraError
from scalora.common.disk_layout import DELTA
from scalora.common.quiet import quiet
from scalora.runs.export.artefact import find_artefact, read_factors
from scalora.runs.export.export import export

TARGETS = "method.target_modules=[embed_tokens,q_proj]"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    """A finished run of four steps on untied weights, and the folder that it lies in."""
    quiet()
    folder = tmp_path_factory.mktemp("laid")
    recipe = exports.lay(folder)
    return folder, recipe, exports.run(recipe, "run", TARGETS, "method.options={interval: 1}")


def _logits(model):
    with torch.no_grad():
        return model.float().eval()(input_ids=exports.IDS).logits


def test_what_the_run_saves_is_a_plain_lora(laid):
    folder, _, run = laid
    adapter = run.folder / "adapter"
    found = read_factors(find_artefact(run.folder))
    assert {name.rsplit(".", 1)[-1] for name in found} == {"embed_tokens", "q_proj"}
    assert all(factors.P.shape[1] > 2 for factors, _ in found.values())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "llama"), adapter)
    plain = AutoModelForCausalLM.from_pretrained(folder / "llama")
    with torch.no_grad():
        for name, (factors, _) in found.items():
            update, weight = factors.P @ factors.Q.T, plain.get_submodule(name).weight
            weight += update.T if "embed" in name else update
    torch.testing.assert_close(_logits(model), _logits(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["run", "checkpoint"])
@pytest.mark.parametrize("to", ["lora", "merged", "delta"])
def test_it_is_exported(laid, tmp_path, what, to):
    folder, _, run = laid
    source = run.folder if what == "run" else run.folder / "checkpoints" / "checkpoint-4"
    done = export(source, to=to, output=tmp_path / "out")
    assert done.difference < 1e-5 * done.largest
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    if to == "lora":
        model = PeftModel.from_pretrained(base, done.folder)
    elif to == "merged":
        model = AutoModelForCausalLM.from_pretrained(done.folder)
    else:
        model, deltas = base, load_file(done.folder / DELTA)
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, delta in deltas.items():
                weights[name] += delta
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "llama"), run.folder / "adapter")
    torch.testing.assert_close(_logits(model), _logits(adapter), rtol=0, atol=1e-5 * done.largest)


def test_a_truncated_export_is_loaded_by_peft(laid, tmp_path):
    folder, _, run = laid
    done = export(run.folder, to="lora", rank=3, output=tmp_path / "out")
    assert {kept.rank for kept in done.kept.values()} == {3}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "llama"), done.folder)


def test_accumulated_in_the_base_it_is_saved_whole(laid):
    folder, recipe, _ = laid
    run = exports.run(recipe, "written", TARGETS, "method.options={interval: 1, accumulate: base}")
    whole = AutoModelForCausalLM.from_pretrained(run.folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    assert not torch.equal(whole.model.embed_tokens.weight, base.model.embed_tokens.weight)
    done = export(run.folder / "checkpoints" / "checkpoint-4", to="merged", output=folder / "written-merged")
    merged = AutoModelForCausalLM.from_pretrained(done.folder)
    torch.testing.assert_close(_logits(merged), _logits(whole), rtol=0, atol=1e-5 * done.largest)


def test_other_methods_refuse_an_embedding_by_name(laid):
    _, recipe, _ = laid
    with pytest.raises(ScaloraError, match=r"embed_tokens adapts an Embedding, which ScaLoRA alone can rescale"):
        exports.run(recipe, "other", "method={name: lora}", TARGETS)
