"""A new kind of task is one new file: recipes, training and export know it by that alone."""

import subprocess
import sys

import yaml

from helpers import workspace
from scalora.tasks import all_tasks

# What somebody would put into src/scalora/tasks/: texts learnt as they are.
FILE = """
from typing import Literal

from scalora.tasks.task import BaseTaskSpec, Score, Task, TokenDataset


class VerbatimSpec(BaseTaskSpec, frozen=True):
    kind: Literal["verbatim"] = "verbatim"
    text: str


class VerbatimTask(Task):
    Spec = VerbatimSpec
    head = "causal-lm"
    spec: VerbatimSpec

    @property
    def columns(self):
        return (self.spec.text,)

    def train_dataset(self, tokenizer, split="train"):
        ids = [tokenizer(row[self.spec.text])["input_ids"] for row in self.rows(split)]
        return TokenDataset([{"input_ids": each, "labels": each} for each in ids], 0)

    def score(self, model, tokenizer, split="test", **options):
        return Score({"rows": len(self.rows(split))}, "rows", [])


TASKS = (VerbatimTask,)
"""
# `scalora.tasks` with one more folder that its files may lie in.
RUN = """
import sys
from importlib.util import find_spec, module_from_spec
import scalora
spec = find_spec("scalora.tasks")
spec.submodule_search_locations.append(sys.argv[1])
sys.modules["scalora.tasks"] = scalora.tasks = module_from_spec(spec)
spec.loader.exec_module(scalora.tasks)

from scalora.runs.export.export import export
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train

try:
    load_recipe(sys.argv[2], ["task.txt=1"])
except scalora.ScaloraError as error:
    print(error)
run = train(load_recipe(sys.argv[2]))
print(run.after.metrics)
done = export(run.folder, to="merged")
print(done.loss_about)
print(type(scalora.load(done.folder)).__name__)
"""


def test_a_new_kind_is_one_file(tmp_path):
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "verbatim.py").write_text(FILE)
    path = workspace.lay(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["task"] = {"kind": "verbatim", "text": "text", "data": recipe["task"]["data"]}
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", RUN, str(tmp_path / "kinds"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wrong, metrics, loss, model = done.stdout.strip().splitlines()
    assert wrong.endswith("unknown key 'task.txt'; did you mean 'text'?")
    assert metrics == "{'rows': 20}"
    assert loss == "mean over 20 test examples"
    assert model == "LlamaForCausalLM"


def test_kinds_are_those_of_the_recipes():
    assert list(all_tasks()) == [
        "chat", "classification", "completion", "image_classification", "multiple_choice", "preference", "recall",
        "seq2seq", "text", "token_classification", "vectors",
    ]  # fmt: skip
