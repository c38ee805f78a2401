"""Exports of every kind of run, loaded in one fresh process that has never heard of scalora."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers import exports, workspace
from scalora.common.disk_layout import DELTA
from scalora.common.quiet import quiet
from scalora.runs.export.artefact import find_artefact
from scalora.runs.export.export import export

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
        monkeypatch.setattr(f"scalora.runs.training.{slow}", lambda *arguments: None)
    recipe = exports.lay(tmp_path)
    originals, cases = {}, []
    for name, (_, result, last) in RUNS.items():
        done = exports.run(recipe, f"run-{name}", *_overrides(tmp_path, name))
        originals[name] = exports.logits(done.loading, "bfloat16" if name == "bf16" else None)
        recipe_of_run = find_artefact(done.folder).recipe
        for path, forms in ((done.folder, result), (done.folder / "checkpoints" / "checkpoint-4", last)):
            for form in forms:
                output = tmp_path / f"{name}-{path.name}-{form}"
                export(path, to=form, output=output, examples=0)
                auto = "AutoModelForSequenceClassification" if "bert" in name else "AutoModelForCausalLM"
                about = {"base": recipe_of_run["model"], "dtype": recipe_of_run["dtype"], "auto": auto}
                cases.append({"name": name, "form": form, "folder": str(output), **about})

    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-c", FRESH, json.dumps(exports.IDS.tolist()), str(tmp_path / "cases.json")]
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


def _overrides(folder, name):
    for given in RUNS[name][0]:
        if given == "bert":
            yield from workspace.classification(folder)
        else:
            yield f"model={folder / given}" if given in ("gpt2", "tied") else given
