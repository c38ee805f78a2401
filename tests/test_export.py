"""Exports of every kind of run, loaded in one fresh process that has never heard of scalora."""

import json
import subprocess
import sys

import pytest
import torch

import ground
import tiny
from scalora.export import export
from scalora.quiet import quiet
from scalora.recipes import load_recipe
from scalora.training import train

IDS = torch.randint(4, tiny.SIZE, (4, 8), generator=torch.Generator().manual_seed(1))
CAUSAL = {"head": "AutoModelForCausalLM"}
TIED = "{tie_word_embeddings: true}"
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
CASES = [
    (name, where, form)
    for name, (_, result, last) in RUNS.items()
    for where, forms in (("run", result), ("last", last))
    for form in forms
]

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


def overrides_of(folder, name):
    for given in RUNS[name][0]:
        if given == "bert":
            yield from ground.classification(folder)
        else:
            yield f"model={folder / given}" if given in ("gpt2", "tied") else given


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every run, every export of it, and the logits that a fresh process computes with each."""
    quiet()
    with pytest.MonkeyPatch.context() as patch:
        for slow in ("draw_curves", "draw_rank"):
            patch.setattr(f"scalora.training.{slow}", lambda *arguments: None)
        return _make(tmp_path_factory)


def _make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    recipe = ground.lay(folder)
    tied = tiny.llama()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    for name, model in (("gpt2", tiny.gpt2()), ("tied", tied)):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    short = ["training.max_steps=4", "training.save_steps=2", "method.rank=2"]
    originals, cases = {}, []
    for name in RUNS:
        output = folder / f"run-{name}"
        method = [o for o in overrides_of(folder, name) if o.startswith("method=")]
        others = [o for o in overrides_of(folder, name) if not o.startswith("method=")]
        parsed = load_recipe(recipe, [*method, *short, *others, f"output={output}"])
        result = train(parsed, baseline=False)
        names, lines = {}, "\n".join(result.loading)
        exec(lines.replace("')", f"', dtype={parsed.dtype!r})") if name == "bf16" else lines, names)
        with torch.no_grad():
            originals[name] = names["model"].float().eval()(input_ids=IDS).logits
        auto = "AutoModelForSequenceClassification" if "bert" in name else "AutoModelForCausalLM"
        for _, where, form in (case for case in CASES if case[0] == name):
            path = output if where == "run" else output / "checkpoints" / "checkpoint-4"
            done = export(path, to=form, output=folder / f"{name}-{where}-{form}", examples=0)
            cases.append(
                {"form": form, "folder": str(done.folder), "auto": auto, "base": parsed.model, "dtype": parsed.dtype}
            )
    (folder / "cases.json").write_text(json.dumps(cases))
    out = folder / "logits.pt"
    command = [sys.executable, "-c", FRESH, json.dumps(IDS.tolist()), str(folder / "cases.json"), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return folder, recipe, originals, torch.load(out)


@pytest.mark.parametrize(("name", "where", "form"), CASES)
def test_a_fresh_process_without_scalora_computes_the_same(made, name, where, form):
    """Within 1e-5 of the largest logit, computed in float32; where the base is bf16, weights are rounded once."""
    folder, _, originals, fresh = made
    original, found = originals[name], fresh[str(folder / f"{name}-{where}-{form}")]
    limit = (0.1 if "bf16" in name and form != "lora" else 1e-5) * float(original.abs().max())
    assert float((found - original).abs().max()) <= limit
