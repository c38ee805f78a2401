"""Every benchmark runs to its end with its default methods, on tiny models and data; none writes into the checkout."""

import dataclasses
import importlib
import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft.tuners import hira, lora
from transformers import BertConfig, BertForSequenceClassification

from helpers import comparisons, tokenized, workspace
from scalora.algebra.whitening import no_whitening
from scalora.arena.results import ComparisonRecord, read_comparison, write_comparison
from scalora.engine.white import moments

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
    for path in (ROOT / "benchmarks").glob("*/*.py")
    if "def main(" in path.read_text(encoding="utf-8")
)


def small(patch, module, **constants):
    for name, value in constants.items():
        patch.setattr(module, name, value)


def in_this_process(command, **_):
    """What subprocess.run does with a command of Python's, where starting Python anew would take seconds."""
    assert command[0] == sys.executable
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", command[2:])
        if command[1] == "-c":
            exec(command[2], {"__name__": "__main__"})
        else:
            with pytest.raises(SystemExit, match="0"):
                runpy.run_module(command[2], run_name="__main__", alter_sys=True)


PEFT_TEST = """
import copy, pytest, torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM
from helpers import tokenized

@pytest.mark.parametrize("config_cls", [LoraConfig, IA3Config])
def test_birth_and_training(config_cls, tmp_path):
    model = get_peft_model(tokenized.llama(), config_cls(target_modules=["q_proj"]))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, tokenized.llama()(ids).logits, rtol=0, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids).logits.sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tokenized.llama(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
"""


# Each makes its module small in the working directory, and gives the arguments and where the result is to be found.


def event(patch, module):
    small(patch, module, SIZES=(16, 32), RANKS=(2, 4), COUNTS=(1, 2), MIDDLE=(2, 32, 4), NARROW=16, LARGE=16)
    small(patch, module, machine=partial(module.machine, 64, 8), load_model=lambda _, head: (tokenized.llama(), None))
    return ["--rank", "2", "--rounds", "3"], "event.json"


def loading(patch, module):
    small(patch, module, fetch=lambda _: "bert")
    small(patch, module, subprocess=SimpleNamespace(run=in_this_process))
    return ["--rounds", "1"], "loading.json"


def overhead(patch, module):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=20_000, **sizes)).save_pretrained("large-vocabulary")
    tokenized.tokenizer().save_pretrained("large-vocabulary")
    tiny = {"source": "large-vocabulary", "head": "sequence-classification", "batch": 2, "tokens": 4, "rank": 2}
    patch.setitem(module.MODELS, "tiny", tiny)
    small(patch, module, peak_memory=lambda *what: module._peak_memory(*what) or 1)  # else a process for each method
    return ["--model", "tiny", "--repeats", "1"], "overhead/tiny-bf16.json"


def padding(patch, module):
    small(patch, module, RECIPES=("demo",))
    return [], "padding.json"


def sketch(patch, module):
    small(patch, module, TOKENS=4, SIZES=((8, 8),))
    return ["--rounds", "1"], "sketch.json"


def throughput(patch, module):
    recipe = yaml.safe_load(Path("recipes/completion.yaml").read_text())
    task = {"kind": "text", "data": recipe["task"]["data"], "max_length": 16}
    Path("recipes/text.yaml").write_text(yaml.safe_dump(recipe | {"task": task}))
    small(patch, module, ROWS="recipes/completion.yaml", PACKED="recipes/text.yaml")
    return ["--data", ".", "--rows", "8", "--rounds", "1"], "throughput.json"


def command(patch, module):  # of benchmarks.gpu
    return ["--precisions", "autocast"], "gpu.json"


def demo_comparison(patch, module):
    small(patch, module, RATES=(1e-2,), VALIDATION=10)
    small(patch, module, subprocess=SimpleNamespace(run=in_this_process))
    return [], "demo_comparison.json"


def gradient_directions(patch, module):
    small(patch, module, SETS=(1, 1, 1))
    return ["recipes/demo.yaml", "--steps", "0,1"], "gradient_directions.json"


def peft_suite(patch, module):
    Path("peft/tests").mkdir(parents=True)
    Path("peft/tests/test_custom_models.py").write_text(PEFT_TEST)

    def run(command, **_):
        sys.modules.pop("test_custom_models", None)  # of another folder
        pytest.main(command[3:])

    small(patch, module, subprocess=SimpleNamespace(run=run))
    return ["peft", "--accumulate", "base"], "peft_suite.json"


def pruning(patch, module):
    _lay_comparison(Path("comparison"))
    return ["comparison"], "pruning.json"


def _lay_comparison(folder):
    """1e-2 ends better than 1e-3 in all its trials, and is ahead from the first look on where it comes first."""
    folder.mkdir()
    comparison = comparisons.small(Path())
    results = {}
    for trial in comparison.tuning():
        slope = 0.1 if trial.lr == 1e-2 else 0.01
        losses = [[step, 5 - slope * step] for step in range(1, 31)]
        results[trial] = comparisons.fake_result(comparison, trial) | {"losses": losses, "steps": 30}
    write_comparison(ComparisonRecord(comparison, results, "x", "abc", comparisons.ENVIRONMENT), folder)
    return comparison


def test_a_replay_counts_what_giving_up_saves_and_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("benchmarks.studies.pruning")
    _lay_comparison(Path("comparison"))
    record = read_comparison(Path("comparison"))
    assert [case[1:5] for case in module.replay(record)] == [(2, 0, 0.0, True)] * 3  # the worse rate comes first
    turned = dataclasses.replace(record.comparison, rates=(1e-4, 1e-3, 1e-2))
    results = dict(record.results)
    for trial in turned.tuning():
        if trial not in results:
            results[trial] = results[trial._replace(lr=1e-3)] | {"losses": [[s, 5.0] for s in range(1, 31)]}
    cases = module.replay(dataclasses.replace(record, comparison=turned, results=results))
    assert [case[1:3] for case in cases] == [(3, 1)] * 3
    assert all(case.same and case.saved == pytest.approx((1 - min(module.MARGINS)) / 3) for case in cases)


def loss_figures(patch, module):
    comparison = _lay_comparison(Path("comparison"))
    record = read_comparison(Path("comparison"))
    finals = {trial: comparisons.fake_result(comparison, trial) for trial in comparison.final(record.chosen)}
    write_comparison(dataclasses.replace(record, results=record.results | finals), Path("comparison"))
    patch.setattr(module, "RESULTS", Path())
    patch.setattr(module, "FIGURES", {"curves": ("comparison", {"lora@2": ("LoRA", "black")})})
    return ["--output", "benchmarks/results"], "curves.png"


def refresh_lab(patch, module):
    small(patch, module, RATES=(1e-2,), SEEDS=2, NOISE={"noisy": (2, 26)})
    return [], "refresh_lab.json"


def rounded_sum(patch, module):
    small(patch, module, MODEL="llama", TOKENS=(5, 20))
    return ["--lr", "1e-3", "--steps", "4"], "rounded_sum.json"


def truncation(patch, module):
    return ["recipes/demo.yaml", "--set", "training.max_steps=1", "--rank", "2"], "truncation.json"


def study(variants, result):
    words = ["--set", "method.rank=2", "--set", "task.data.validation_size=10", "--lr", "1e-2", "--seeds", "1"]
    return ["recipes/demo.yaml", *words, "--variants", ",".join(variants)], result


def white_ablations(patch, module):
    few = ("as it is", "only inputs are whitened", "rescaled every 10 steps")
    patch.setattr(module, "VARIANTS", {name: module.VARIANTS[name] for name in few})
    return study(few, "white_ablations.json")


def rescaled_hira(patch, module):
    small(patch, module, EVERY=2)
    return study(module.VARIANTS, "rescaled_hira.json")


def test_variants_of_white_lora_are_what_they_say():
    module = importlib.import_module("benchmarks.studies.white_ablations")
    X, trace = torch.randn(6, 2, dtype=torch.float64), torch.tensor(9.0, dtype=torch.float64)
    start = no_whitening(torch.linalg.qr(torch.randn(1, 6, 2, dtype=torch.float64)).Q)
    for name, whitened in (("only inputs are whitened", [False, True]), ("only output gradients are", [True, False])):
        with module.changed(name) as options:
            found = moments.nystrom(2 * [moments.Seen(start, X[None], trace[None])], 0.0)
        assert options == []
        assert [not torch.equal(white.e, torch.ones_like(white.e)) for white in found] == whitened
    for name in module.VARIANTS:  # whatever is put in place of something, there is such a thing
        with module.changed(name):
            pass


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(workspace.lay(tmp_path).read_text())
    recipe["training"]["max_steps"], recipe["method"] = 2, {"name": "lora", "rank": 2}
    Path("recipes").mkdir()
    Path("recipes/demo.yaml").write_text(yaml.safe_dump(recipe))
    words = {"kind": "completion", "prompt": "{text}", "completion": " yes", "max_length": 16}
    data = recipe["task"]["data"] | {"train": "data.jsonl"}
    Path("recipes/completion.yaml").write_text(yaml.safe_dump(recipe | {"task": words | {"data": data}}))

    module = importlib.import_module(f"benchmarks.{name}")
    threads = torch.get_num_threads()
    arguments, result = globals()[name.split(".")[-1]](monkeypatch, module)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    written = Path("benchmarks/results", result)
    assert written.is_file()
    if written.suffix == ".json":
        text = written.read_text(encoding="utf-8")
        json.loads(text, parse_constant=lambda value: pytest.fail(f"{value} in {written}"))
        assert {'"command"', '"environment"'} <= set(text.replace(":", " ").split())


@pytest.mark.parametrize(("name", "kind"), [("lora:peft", lora.layer.Linear), ("hira:peft", hira.layer.Linear)])
def test_overhead_compares_with_layers_of_peft(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("benchmarks.cost.overhead")
    overhead(monkeypatch, module)
    runner = module.load_runner(name, module.MODELS["tiny"], "fp32", "cpu")
    assert {type(layer) for layer in runner.model.modules() if isinstance(layer, kind)} == {kind}


def test_the_harness_of_pefts_tests_tells_what_fails_with_scalora_only(tmp_path, monkeypatch):
    """Of what accumulate="base" has written to the base no adapter can be saved; the other store's passes."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("benchmarks.studies.peft_suite")
    peft_suite(monkeypatch, module)
    tests = Path("peft/tests/test_custom_models.py").resolve()
    plain, adapter, base = (module.run(tests, store, "") for store in ("none", "adapter", "base"))
    assert list(plain["outcomes"].values()) == list(adapter["outcomes"].values()) == ["passed"]
    assert adapter["attached"] == {"birth": 1, "optimizer": 1}
    ((message, tests),) = module.compare(plain, base)["only_with_scalora"].items()
    assert "save the whole model" in message
    assert tests == {"test_birth_and_training": 1}
