"""Recipes of kind chat as whole runs: trained, resumed, compared, exported, as the documentation writes them."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

import scalora
from helpers import chats, tokenized, workspace
from helpers.chats import said
from scalora.arena import trial
from scalora.arena.contender import Contender
from scalora.arena.plan import Comparison
from scalora.common.errors import ScaloraError
from scalora.common.quiet import quiet
from scalora.runs.export.export import export
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Interrupted, train

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of the documentation, on a tiny model and conversations made on the spot."""
    quiet()
    folder = tmp_path_factory.mktemp("chat")
    chats.llama().save_pretrained(folder / "llama")
    chats.tokenizer().save_pretrained(folder / "llama")
    words = ["hello", "world", "apples", "Question"]
    rows = [
        {"messages": chats.TWO_TURNS[: 3 * (i % 2)] + said(("user", f"{word} {i}"), ("assistant", f"{word} {12 + i}"))}
        for i, word in enumerate(words * 12)
    ]
    tokenized.write_jsonl(folder / "chats.jsonl", rows)
    (written,) = re.findall(r"```yaml\n(model: smollm2[^`]*kind: chat\n[^`]*)```", DOCS.read_text(encoding="utf-8"))
    content = yaml.safe_load(written)
    content |= {"model": str(folder / "llama"), "precision": "float32", "output": str(folder / "run")}
    content["task"]["data"]["folder"] = str(folder)
    content["task"]["data"] |= {"test_size": 12, "validation_size": 8}
    content["training"] |= {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "learning_rate": 1e-2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def test_a_run_learns_resumes_and_is_exported(recipe, tmp_path):
    whole = train(load_recipe(recipe))
    assert set(whole.after.metrics) == {"nll"}
    assert whole.after.metrics["nll"] < whole.before.metrics["nll"]
    cut = load_recipe(recipe, [f"output={tmp_path / 'cut'}"])
    with workspace.stopped_at(3), pytest.raises(Interrupted):
        train(cut)
    assert train(cut, resume=True).after.metrics == whole.after.metrics
    done = export(whole.folder, to="merged")
    assert done.loss_about.startswith("mean over 8 validation")
    exported = AutoTokenizer.from_pretrained(done.folder)
    assert exported.chat_template == chats.CHATML
    ids = exported.apply_chat_template(chats.ONE_TURN, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        logits = [scalora.load(folder).eval()(ids).logits for folder in (whole.folder, done.folder)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_a_comparisons_trial(recipe):
    comparison = Comparison(load_recipe(recipe), (Contender("lora", 2),), (1e-3, 1e-2), (0,), (0,))
    result = trial.run_trial(comparison, comparison.tuning()[0], lambda: None, every=60)
    assert result["primary"] == "nll"
    assert result["higher_is_better"] is False


def test_a_template_of_the_recipes_own_goes_with_the_export(recipe, tmp_path):
    folder = tmp_path / "base"
    chats.llama().save_pretrained(folder)
    chats.tokenizer(template=None).save_pretrained(folder)
    overrides = [f"model={folder}", f"output={tmp_path / 'run'}", "training.max_steps=1"]
    with pytest.raises(ScaloraError, match=r"has no chat template.*task\.chat_template"):
        train(load_recipe(recipe, overrides))
    content = yaml.safe_load(recipe.read_text())
    content["task"]["chat_template"] = chats.CHATML
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(content))
    done = export(train(load_recipe(own, overrides)).folder, to="merged")
    assert AutoTokenizer.from_pretrained(done.folder).chat_template == chats.CHATML


@pytest.mark.real
def test_smollm2_is_read_by_its_own_template():
    from scalora.models.load import load_model
    from scalora.tasks.conversations import Conversation
    from scalora.tasks.turns import ChatTemplate

    tokenizer = load_model("smollm2-135m-instruct", head="causal-lm")[1]
    found = ChatTemplate(tokenizer).read(Conversation(chats.ONE_TURN), "rows, row 1")
    assert tokenizer.decode(found.ids) == tokenizer.apply_chat_template(chats.ONE_TURN, tokenize=False)
    own = [token for token, learnt in zip(found.ids, found.learnt, strict=True) if learnt]
    assert tokenizer.decode(own) == "Question: 😀<|im_end|>\n"
