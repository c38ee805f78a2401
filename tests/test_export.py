"""Exports of every kind of run, loaded in one fresh process that has never heard of scalora."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ground
import tiny
import zoo
from scalora import ScaLoraConfig, ScaloraError, attach
from scalora.artefact import DELTA, EXPORT, find_artefact, read_factors
from scalora.base_model import Base
from scalora.export import export
from scalora.files import SEAL
from scalora.probe import probe
from scalora.quiet import quiet
from scalora.recipes import load_recipe
from scalora.restored import restore
from scalora.training import train

IDS = torch.randint(4, tiny.SIZE, (4, 8), generator=torch.Generator().manual_seed(1))
# name: overrides of the recipe, the exports of its result, and of its newest checkpoint.
RUNS = {
    "scalora": (["method.options={interval: 1}"], ["lora", "merged", "delta"], ["lora", "merged"]),
    "bf16": (["method.options={interval: 1}", "dtype=bfloat16"], ["lora", "merged", "delta"], ["merged"]),
    "base": (["method.options={interval: 1, accumulate: base}"], ["merged", "delta"], ["merged", "delta"]),
    "base-bf16": (["method.options={interval: 1, accumulate: base}", "dtype=bfloat16"], ["delta"], ["merged"]),
    "bert": (["bert"], ["lora", "merged", "delta"], ["lora", "delta"]),
    "bert-full": (["bert", "method=full"], ["merged", "delta"], []),
    "gpt2": (["gpt2", "method.options={interval: 1}"], ["lora", "merged", "delta"], []),
    "tied": (["tied", "method.target_modules=[q_proj, lm_head]"], ["lora", "merged"], []),
    "full": (["method=full"], ["delta"], ["merged"]),
    "mora": (["method=mora"], ["merged", "delta"], []),
    "alpha": (["method=alpha-lora", "method.options={batch: 4}"], ["merged", "delta"], []),
    "hira": (["method=hira"], [], ["merged"]),
    "dora": (["method=dora"], ["delta"], []),
    "loha": (["method=peft:LOHA"], ["merged"], []),
    "relora": (["method=relora", "method.options={every: 2}"], [], ["lora"]),
}
# What docs/export.md says about each form, and nothing of ours.
FRESH = """
import json, sys, torch
sys.modules["scalora"] = None  # any import of it would fail
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from pathlib import Path
ids = torch.tensor(json.loads(sys.argv[1]))
logits = {}
for case in json.loads(Path(sys.argv[2]).read_text()):
    auto = getattr(transformers, case["auto"])
    folder = Path(case["folder"])
    if case["form"] == "merged":
        model = auto.from_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(folder)
    else:
        labels = {"num_labels": 2} if "Sequence" in case["auto"] else {}
        model = auto.from_pretrained(case["base"], dtype=case["dtype"], **labels)
        if case["form"] == "lora":
            model = PeftModel.from_pretrained(model, folder)
        else:
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, delta in load_file(folder / "delta.safetensors").items():
                    parameters[name].copy_(parameters[name].float() + delta)
                if (folder / "replaced.safetensors").exists():
                    for name, value in load_file(folder / "replaced.safetensors").items():
                        parameters[name].copy_(value)
    with torch.no_grad():
        logits[case["folder"]] = model.float().eval()(input_ids=ids).logits
torch.save(logits, sys.argv[3])
"""


def test_a_fresh_process_without_scalora_computes_the_same(tmp_path, monkeypatch):
    """Within 1e-5 of the largest logit, computed in float32; where the base is bf16, weights are rounded once.

    One test for all of them, because starting the fresh process takes longer than everything in it.
    """
    quiet()
    for slow in ("draw_curves", "draw_rank"):
        monkeypatch.setattr(f"scalora.training.{slow}", lambda *arguments: None)
    recipe = _ground(tmp_path)
    originals, cases = {}, []
    for name, (_, result, last) in RUNS.items():
        done = _train(recipe, f"run-{name}", *_overrides(tmp_path, name))
        originals[name] = _logits(done.loading, "bfloat16" if name == "bf16" else None)
        recipe_of_run = find_artefact(done.folder).recipe
        for path, forms in ((done.folder, result), (done.folder / "checkpoints" / "checkpoint-4", last)):
            for form in forms:
                output = tmp_path / f"{name}-{path.name}-{form}"
                export(path, to=form, output=output, examples=0)
                auto = "AutoModelForSequenceClassification" if "bert" in name else "AutoModelForCausalLM"
                about = {"base": recipe_of_run["model"], "dtype": recipe_of_run["dtype"], "auto": auto}
                cases.append({"name": name, "form": form, "folder": str(output), **about})

    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-c", FRESH, json.dumps(IDS.tolist()), str(tmp_path / "cases.json")]
    subprocess.run([*command, str(tmp_path / "logits.pt")], check=True, capture_output=True)
    fresh = torch.load(tmp_path / "logits.pt")
    differences = {}
    for case in cases:
        original = originals[case["name"]]
        limit = 0.1 if "bf16" in case["name"] and case["form"] != "lora" else 1e-5
        largest = float((fresh[case["folder"]] - original).abs().max() / original.abs().max())
        if not largest <= limit:
            differences[Path(case["folder"]).name] = largest
    assert differences == {}

    base, delta = (
        load_file(f) for f in (tmp_path / "llama/model.safetensors", tmp_path / "bf16-run-bf16-delta" / DELTA)
    )
    merged = load_file(tmp_path / "bf16-run-bf16-merged" / "model.safetensors")
    assert len(delta) == 14
    for name, weight in base.items():  # summed in float32, rounded once
        exact = weight.to(torch.bfloat16).float() + delta.get(name, 0)
        assert torch.equal(merged[name], exact.to(torch.bfloat16)), name
    saved = load_file(tmp_path / "run-base-bf16" / "adapter" / "model.safetensors")
    merged = load_file(tmp_path / "base-bf16-checkpoint-4-merged" / "model.safetensors")
    assert {name for name in saved if not torch.equal(saved[name], merged[name])} == set()


def _ground(folder):
    recipe = ground.lay(folder)
    tied = tiny.llama()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    for name, model in (("gpt2", tiny.gpt2()), ("tied", tied)):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    return recipe


def _overrides(folder, name):
    for given in RUNS[name][0]:
        if given == "bert":
            yield from ground.classification(folder)
        else:
            yield f"model={folder / given}" if given in ("gpt2", "tied") else given


def _train(recipe, name, *overrides):
    method = [each for each in overrides if each.startswith("method=")]
    short = ["training.max_steps=4", "training.save_steps=2", f"output={recipe.parent / name}"]
    others = [each for each in overrides if not each.startswith("method=")]
    return train(load_recipe(recipe, [*method, "method.rank=2", *short, *others]), baseline=False)


def _logits(lines, dtype=None):
    """What the lines that a run prints compute."""
    names, lines = {}, "\n".join(lines)
    exec(lines.replace("')", f"', dtype={dtype!r})") if dtype else lines, names)
    with torch.no_grad():
        return names["model"].float().eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    """A finished run of eight steps, and the folder that it lies in."""
    quiet()
    folder = tmp_path_factory.mktemp("laid")
    recipe = _ground(folder)
    return folder, _train(recipe, "run", "method.options={interval: 1}")


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
    pair = run.folder / "checkpoints" / "checkpoint-4"
    done = export(pair, to="lora", rank=3)
    assert done.folder == folder / "run-checkpoint-4-lora-rank3"
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})

    update, truncated = (dense(find_artefact(path)) for path in (pair, done.folder))
    assert update.keys() == truncated.keys() == done.kept.keys()
    for name, W in update.items():
        U, sigma, Vt = torch.linalg.svd(W)
        best = U[:, :3] * sigma[:3] @ Vt[:3]
        torch.testing.assert_close(truncated[name], best, rtol=0, atol=1e-5)
        kept = float(sigma[:3].square().sum() / sigma.square().sum())
        assert done.kept[name].energy == pytest.approx(kept, abs=1e-6)
        assert done.kept[name].columns == 2 + 6  # r, and three events that moved something

    assert done.loss is not None
    before, after = done.loss
    assert before != after
    record = json.loads((done.folder / EXPORT).read_text())
    assert record["loss"] == {"original": before, "export": after}
    assert record["layers"][name]["energy"] == done.kept[name].energy
    assert "20 test examples" in record["loss_about"]

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "llama"), done.folder)
    assert float((probe(model.eval()) - probe(load(pair)[0])).abs().max()) == pytest.approx(done.difference, rel=1e-3)


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


def test_a_pair_that_save_pretrained_wrote_needs_no_run(tmp_path):
    """Someone's own loop: no recipe, no Trainer; PEFT does not know where such a base model came from."""
    zoo.base("bert").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model = zoo.lora("bert", r=3, rank_pattern={"value": 2}, use_rslora=True)
    optimizer = torch.optim.AdamW(zoo.trainable(model), lr=1e-2)
    attach(model, optimizer, ScaLoraConfig(interval=1))
    zoo.train(model, optimizer, "bert", 5)
    model.save_pretrained(tmp_path / "pair")
    with pytest.raises(ScaloraError, match="names its base model: give it with --base"):
        export(tmp_path / "pair", to="merged")
    done = export(tmp_path / "pair", to="merged", base=str(tmp_path / "base"))
    assert "no recipe.yaml" in done.loss_about
    merged = AutoModelForSequenceClassification.from_pretrained(done.folder)
    torch.testing.assert_close(zoo.logits(merged, "bert"), zoo.logits(model, "bert"), rtol=0, atol=1e-5)
    with pytest.raises(ScaloraError, match="whole model already"):
        export(done.folder, to="merged")


REFUSED = {
    "mora": ("merged", "method=mora", "checkpoint-4", "checkpoints of mora cannot be exported"),
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
    run = _train(folder / "recipe.yaml", f"refused-{case}", *tied)
    path = run.folder / "checkpoints" / checkpoint if checkpoint else run.folder
    with pytest.raises(ScaloraError, match=re.escape(words)):
        export(path, to=form, output=folder / "refused")
    assert not (folder / "refused").exists()


def test_a_foreign_base_and_an_incomplete_or_spoilt_adapter_are_refused(laid, tmp_path):
    folder, run = laid
    other = tiny.llama()
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ScaloraError, match="fingerprint"):
        export(run.folder, to="merged", base=str(tmp_path / "other"))
    adapter = _copy(run.folder / "adapter", tmp_path / "adapter")
    with pytest.raises(ScaloraError, match="does not fit the base model"):
        export(adapter, to="lora", base=str(folder / "gpt2"))
    with pytest.raises(ScaloraError, match=r"no file or folder.*--base"):
        export(adapter, to="lora", base=str(tmp_path / "gone"))

    checkpoint = run.folder / "checkpoints" / "checkpoint-4"
    halved = _copy(checkpoint, tmp_path / "halved")
    shutil.rmtree(halved / "accumulated")
    with pytest.raises(ScaloraError, match="lacks accumulated/"):
        export(halved, to="lora")

    def spoil(tensors):
        next(iter(tensors.values()))[0, 0] = torch.nan

    for part in ("", "accumulated"):
        spoilt = _copy(checkpoint, tmp_path / f"spoilt{part}")
        _edit(spoilt / part / "adapter_model.safetensors", spoil)
        with pytest.raises(ScaloraError, match="not finite"):
            export(spoilt, to="lora")

    def shorten(tensors):
        tensors.pop(next(name for name in tensors if "lora_B" in name))

    def narrow(tensors):
        for name, tensor in tensors.items():
            tensors[name] = (tensor[:2] if "lora_A" in name else tensor[:, :2]).clone()

    for number, (part, change, words) in enumerate(
        [
            ("", shorten, "does not fit the base model"),
            ("accumulated", shorten, "do not belong together"),
            ("accumulated", narrow, "does not fit the base model"),
        ]
    ):
        changed = _copy(checkpoint, tmp_path / f"changed{number}")
        _edit(changed / part / "adapter_model.safetensors", change)
        with pytest.raises(ScaloraError, match=words):
            export(changed, to="lora")
    assert not [path for path in tmp_path.iterdir() if "-lora" in path.name or path.name.startswith(".")]


def test_a_checkpoint_that_differs_from_its_seal_is_refused(laid, tmp_path):
    _, run = laid
    shutil.copytree(run.folder / "checkpoints" / "checkpoint-4", tmp_path / "checkpoint-4")
    weights = tmp_path / "checkpoint-4" / "accumulated" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ScaloraError, match="other content than was written"):
        export(tmp_path / "checkpoint-4", to="lora")


def test_a_weight_that_is_no_ordinary_matrix_is_not_merged(laid, tmp_path, monkeypatch):
    _, run = laid
    monkeypatch.setattr("scalora.restored.is_dense", lambda layer: False)  # as for quantised weights
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

    monkeypatch.setattr("scalora.export.write_json", fail)  # the last thing that is written
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
    monkeypatch.setattr("scalora.plain._plain", lambda config, ranks: config)  # forgets the joined ranks
    pair = run.folder / "checkpoints" / "checkpoint-4"
    with pytest.raises((ScaloraError, RuntimeError)):
        export(pair, to="lora", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
