"""What an export keeps when it is truncated, what is refused, and what is left when something goes wrong."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, CodeGenConfig, CodeGenForCausalLM

from helpers import exports, models, tokenized
from scalora import ScaLoraConfig, ScaloraError, attach
from scalora.common.disk_layout import DELTA, EXPORT, SEAL
from scalora.common.quiet import quiet
from scalora.runs.export.artefact import find_artefact, read_factors
from scalora.runs.export.base_model import Base
from scalora.runs.export.export import export
from scalora.runs.export.restored_peft import restore
from scalora.runs.export.verify import probe


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    """A finished run of eight steps, and the folder that it lies in."""
    quiet()
    folder = tmp_path_factory.mktemp("laid")
    recipe = exports.lay(folder)
    return folder, exports.run(recipe, "run", "method.options={interval: 1}")


def _copy(source, target):
    """A copy, of a checkpoint without its seal: other checks than that must hold too."""
    shutil.copytree(source, target)
    (target / SEAL).unlink(missing_ok=True)
    return target


def _edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_truncated_export_is_the_best_approximation_and_says_what_it_costs(laid):
    folder, run = laid
    whole = run.folder / "checkpoints" / "checkpoint-4"
    done = export(whole, to="lora", rank=3)
    assert done.folder == folder / "run-checkpoint-4-lora-rank3"
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})

    update, truncated = (dense(find_artefact(path)) for path in (whole, done.folder))
    assert update.keys() == truncated.keys() == done.kept.keys()
    for name, W in update.items():
        U, sigma, Vt = torch.linalg.svd(W)
        best = U[:, :3] * sigma[:3] @ Vt[:3]
        torch.testing.assert_close(truncated[name], best, rtol=0, atol=1e-5)
        kept = float(sigma[:3].square().sum() / sigma.square().sum())
        assert done.kept[name].energy == pytest.approx(kept, abs=1e-6)
        assert done.kept[name].columns == 2 + 4 * 2  # r, and a slot for each of four events

    assert done.loss is not None
    before, after = done.loss
    assert before != after
    record = json.loads((done.folder / EXPORT).read_text())
    assert record["loss"] == {"original": before, "export": after}
    assert record["layers"][name]["energy"] == done.kept[name].energy
    assert "20 test examples" in record["loss_about"]

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "llama"), done.folder)
    assert float((probe(model.eval()) - probe(load(whole)[0])).abs().max()) == pytest.approx(done.difference, rel=1e-3)


@pytest.mark.parametrize("energy", [0.9, 0.999])
def test_energy_gives_each_layer_the_least_rank_that_keeps_it(laid, tmp_path, energy):
    _, run = laid
    done = export(run.folder, to="lora", energy=energy, output=tmp_path / "small")
    for name, W in dense(find_artefact(run.folder)).items():
        kept = torch.linalg.svdvals(W).square().cumsum(0)
        least = int((kept < energy * kept[-1]).sum()) + 1
        assert done.kept[name].rank == least
        assert done.kept[name].energy >= energy
    assert len({kept.rank for kept in done.kept.values()}) > 1  # so that PEFT's rank_pattern is needed
    shapes = {name: factors.P.shape[1] for name, (factors, _) in read_factors(find_artefact(done.folder)).items()}
    assert shapes == {name: kept.rank for name, kept in done.kept.items()}


def dense(artefact):
    return {
        name: sum(part.P.double() @ part.Q.double().T for part in parts if part is not None)
        for name, parts in read_factors(artefact).items()
    }


def load(path, base=None):
    artefact = find_artefact(path)
    restored = restore(artefact, Base(artefact, base))
    return restored.model, restored


def test_the_data_may_be_gone(laid, tmp_path):
    folder, run = laid
    moved = _copy(run.folder, tmp_path / "run")
    text = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(text.replace(str(folder / "data.jsonl"), "gone.jsonl"))
    done = export(moved, to="lora")
    assert done.loss is None
    assert "gone.jsonl" in done.loss_about


def test_what_save_pretrained_wrote_needs_no_run(tmp_path):
    """Someone's own loop: no recipe, no Trainer; PEFT does not know where such a base model came from."""
    models.base("bert").save_pretrained(tmp_path / "base")
    tokenized.tokenizer().save_pretrained(tmp_path / "base")
    model = models.lora("bert", r=3, rank_pattern={"value": 2}, use_rslora=True)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    attach(model, optimizer, ScaLoraConfig(interval=1))
    models.train(model, optimizer, "bert", 5)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ScaloraError, match="names its base model: give it with --base"):
        export(tmp_path / "whole", to="merged")
    done = export(tmp_path / "whole", to="merged", base=str(tmp_path / "base"))
    assert "no recipe.yaml" in done.loss_about
    merged = AutoModelForSequenceClassification.from_pretrained(done.folder)
    torch.testing.assert_close(models.logits(merged, "bert"), models.logits(model, "bert"), rtol=0, atol=1e-5)
    with pytest.raises(ScaloraError, match="whole model already"):
        export(done.folder, to="merged")


REFUSED = {
    "mora": ("merged", "method=mora", "checkpoint-4", "checkpoints of mora cannot be restored"),
    "pissa": ("merged", "method=pissa", "checkpoint-4", "init_lora_weights='pissa' has rewritten"),
    "hira": ("lora", "method=hira", None, "it is HIRA and not plain LoRA; use --to merged or --to delta"),
    "base": ("lora", "method.options={accumulate: base, interval: 1}", "checkpoint-4", "accumulate='base'"),
    "tied": ("delta", "tied", None, "shares its weight with another"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(laid, case):
    folder, _ = laid
    form, override, checkpoint, words = REFUSED[case]
    tied = [f"model={folder / 'tied'}", "method.target_modules=[lm_head]"] if override == "tied" else [override]
    run = exports.run(folder / "recipe.yaml", f"refused-{case}", *tied)
    path = run.folder / "checkpoints" / checkpoint if checkpoint else run.folder
    with pytest.raises(ScaloraError, match=re.escape(words)):
        export(path, to=form, output=folder / "refused")
    assert not (folder / "refused").exists()


def test_a_foreign_base_and_an_incomplete_or_spoilt_adapter_are_refused(laid, tmp_path):
    folder, run = laid
    other = tokenized.llama()
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "other")
    tokenized.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ScaloraError, match="fingerprint"):
        export(run.folder, to="merged", base=str(tmp_path / "other"))
    adapter = _copy(run.folder / "adapter", tmp_path / "adapter")
    with pytest.raises(ScaloraError, match="does not fit the base model"):
        export(adapter, to="lora", base=str(folder / "gpt2"))
    with pytest.raises(ScaloraError, match=r"no file or folder.*--base"):
        export(adapter, to="lora", base=str(tmp_path / "gone"))

    checkpoint = run.folder / "checkpoints" / "checkpoint-4"

    def spoil(tensors):
        next(iter(tensors.values()))[0, 0] = torch.nan

    spoilt = _copy(checkpoint, tmp_path / "spoilt")
    _edit(spoilt / "adapter_model.safetensors", spoil)
    with pytest.raises(ScaloraError, match="not finite"):
        export(spoilt, to="lora")

    def shorten(tensors):
        tensors.pop(next(name for name in tensors if "lora_B" in name))

    def narrow(tensors):
        for name, tensor in tensors.items():
            tensors[name] = (tensor[:2] if "lora_A" in name else tensor[:, :2]).clone()

    for number, (change, words) in enumerate(
        [(shorten, "does not fit the base model"), (narrow, "they do not belong together")]
    ):
        changed = _copy(checkpoint, tmp_path / f"changed{number}")
        _edit(changed / "adapter_model.safetensors", change)
        with pytest.raises(ScaloraError, match=words):
            export(changed, to="lora")
    assert not [path for path in tmp_path.iterdir() if "-lora" in path.name or path.name.startswith(".")]


def test_a_checkpoint_that_differs_from_its_seal_is_refused(laid, tmp_path):
    _, run = laid
    shutil.copytree(run.folder / "checkpoints" / "checkpoint-4", tmp_path / "checkpoint-4")
    weights = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ScaloraError, match="other content than was written"):
        export(tmp_path / "checkpoint-4", to="lora")


def test_a_weight_that_is_no_ordinary_matrix_is_not_merged(laid, tmp_path, monkeypatch):
    _, run = laid
    monkeypatch.setattr("scalora.runs.export.restored_peft.is_dense", lambda layer: False)  # as for quantised weights
    for form in ("merged", "delta"):
        with pytest.raises(ScaloraError, match=r"layer .*q_proj \(Linear\) is quantised.*--to lora"):
            export(run.folder, to=form, output=tmp_path / "out")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("form", ["lora", "merged", "delta"])
def test_what_goes_wrong_leaves_nothing_half_written(laid, tmp_path, monkeypatch, failure, form):
    _, run = laid
    before = export(run.folder, to="lora", rank=1, output=tmp_path / "kept")
    content = (before.folder / EXPORT).read_bytes()

    def fail(*arguments):
        raise failure

    monkeypatch.setattr("scalora.runs.export.export.write_json", fail)  # the last thing that is written
    for output, overwrite in ((tmp_path / "a" / "b" / "new", False), (before.folder, True)):
        with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ScaloraError) as caught:
            export(run.folder, to=form, output=output, overwrite=overwrite)
        if isinstance(failure, OSError):
            assert "No space left" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (before.folder / EXPORT).read_bytes() == content


def test_only_an_earlier_export_is_replaced(laid, tmp_path):
    _, run = laid
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    for overwrite, words in ((False, "not empty"), (True, "no earlier export")):
        with pytest.raises(ScaloraError, match=words):
            export(run.folder, to="lora", output=mine, overwrite=overwrite)
    first = export(run.folder, to="lora", output=tmp_path / "out")
    with pytest.raises(ScaloraError, match="no earlier export of this"):  # it would be read and replaced at once
        export(first.folder, to="lora", rank=1, output=first.folder, overwrite=True)
    export(run.folder, to="delta", output=first.folder, overwrite=True)
    assert sorted(path.name for path in first.folder.iterdir()) == [DELTA, EXPORT]
    assert len({path.stat().st_mode for path in first.folder.iterdir()}) == 1  # all as the umask would have it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_result_that_differs_is_not_handed_out(laid, tmp_path, monkeypatch):
    _, run = laid
    monkeypatch.setattr("scalora.engine.plain_lora.joined_ranks", lambda sizes: {})  # forgets the joined ranks
    whole = run.folder / "checkpoints" / "checkpoint-4"
    with pytest.raises((ScaloraError, RuntimeError)):
        export(whole, to="lora", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_that_were_trained_are_no_difference(laid, tmp_path, modules):
    base = tokenized.llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    tokenized.tokenizer().save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules))
    for param in model.parameters():
        param.data += 0.01 * param.requires_grad * torch.randn_like(param)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ScaloraError, match=r"embed_tokens.weight and lm_head.weight are tied.*use --to merged"):
        export(tmp_path / "adapter", to="delta", base=str(tmp_path / "base"))
    done = export(tmp_path / "adapter", to="merged", base=str(tmp_path / "base"))
    assert done.difference < 1e-4


def test_more_chat_templates_can_be_opened_and_a_config_may_know_no_padding(tmp_path):
    recipe = exports.lay(tmp_path)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    config = CodeGenConfig(vocab_size=tokenized.SIZE, bos_token_id=1, eos_token_id=2, **sizes)
    assert not hasattr(config, "pad_token_id")
    CodeGenForCausalLM(config).save_pretrained(tmp_path / "codegen")
    tokenizer = tokenized.tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "rag": "{{ messages[-1].content }}"}
    tokenizer.save_pretrained(tmp_path / "codegen")
    run = exports.run(recipe, "others", f"model={tmp_path / 'codegen'}")
    done = export(run.folder, to="merged")
    templates = [path for path in done.folder.iterdir() if path.is_dir()]
    assert templates
    assert all(path.stat().st_mode & 0o100 for path in templates)
