"""What the pages name exists: the paper's functions, the public interface, every setting."""

import dataclasses
import re
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

import scalora
from scalora.methods import Family, all_methods

DOCS = Path(__file__).parents[2] / "docs"
BUILT = (DOCS / "built.md").read_text(encoding="utf-8").split("## Paper to code")[1]
NAMED = sorted(set(re.findall(r"`(\w+\.[\w.]+)`", BUILT)))


def _resolve(dotted):
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[end:], module)
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("name", NAMED)
def test_the_functions_of_the_paper_exist(name):
    assert callable(_resolve(f"scalora.{name}"))


PAGES = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_calls_by_its_path_exists(page):
    for name in re.findall(r"\b(scalora(?:\.[a-zA-Z_]\w*)+)", page.read_text(encoding="utf-8")):
        if not name.endswith(".safetensors"):
            _resolve(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_runs_exists(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (benchmarks[\w.]+)", text):
        place = DOCS.parent / module.rstrip(".").replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    for recipe in re.findall(r"\b(recipes/[\w-]+\.yaml)", text):
        assert (DOCS.parent / recipe).is_file(), recipe


@pytest.mark.parametrize("item", ["Equation 7", "Theorem 1", "Theorem 3", "Theorem 5", "Lemmas 2 and 4", "Algorithm 1"])
def test_each_item_of_the_paper_has_a_function(item):
    assert re.search(rf"^\| {item} \|.*\| `\w+\.\w+\.\w+", BUILT, flags=re.MULTILINE)


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: scalora\.(\w+)$", (DOCS / "reference" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(shown) == sorted(scalora.__all__)


def test_every_setting_has_its_row():
    text = (DOCS / "library.md").read_text(encoding="utf-8").split("`ScaLoraConfig`")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE)
    assert rows == [field.name for field in dataclasses.fields(scalora.ScaLoraConfig)]


def test_the_table_of_families_is_that_of_the_methods():
    text = (DOCS / "methods.md").read_text(encoding="utf-8").split("`rank`, `alpha`")[0]
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+) \|", text, flags=re.MULTILINE)
    told = {title: [name for name in re.findall(r"`([^`]+)`", names) if ":" not in name] for title, names in rows}
    methods = all_methods().items()
    assert told == {each.value: [name for name, method in methods if method.family is each] for each in Family}


def test_the_table_of_methods_is_complete():
    table = (DOCS / "methods.md").read_text(encoding="utf-8").split("## Notes")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (`.*) \|$", table, flags=re.MULTILINE)]
    options = {name: row[3] for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    assert options.keys() - {"peft:<TYPE>"} == all_methods().keys()
    for name, method in all_methods().items():
        if "ScaLoraConfig" not in options[name]:
            assert re.findall(r"`(\w+):", options[name]) == list(method.Options.model_fields), name
