import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_forms import HUB, JSON, record

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.runs.recipe import parse_recipe
from scalora.tasks import build_task
from scalora.tasks.benchmarks import COMMONSENSE, GLUE_TASKS, PROMPTS, commonsense_task, glue_task


def built(task):
    """The task of a recipe that holds this section, by way of YAML."""
    section = yaml.safe_load(yaml.safe_dump(task))
    return build_task(parse_recipe({"model": "m", "task": section, "method": "lora", "output": "o"}).task)


# The release's files: the header (none for CoLA), then a row; and what the row says, text first and label last.
RELEASE = {
    "CoLA": ("", "gj04\t{}\t*\tThe cat sat", "0", "1", ("The cat sat",)),
    "SST-2": ("sentence\tlabel", "a fine film \t{}", "0", "1", ("a fine film ",)),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '{}\t7\t8\tHe " said\tHe said',
        "0",
        "1",
        ('He " said', "He said"),
    ),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t1\tnone\tnone\ta\tb\t{}",
        "3.800",
        "0.000",
        ("a", "b"),
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\twho?\twhy?\t{}",
        "0",
        "1",
        ("who?", "why?"),
    ),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1e\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\ta\tb\tneutral\t{}",
        "contradiction",
        "entailment",
        ("a", "b"),
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\twho?\tKai.\t{}", "entailment", "not_entailment", ("who?", "Kai.")),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\ta\tb\t{}", "not_entailment", "entailment", ("a", "b")),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "0\ta\tb\t{}", "1", "0", ("a", "b")),
}


def write_release(folder, name, other=None):
    header, row, one, usual, _ = RELEASE[name]
    for split in ("train", GLUE_TASKS[name].dev[0]):
        path = folder / "glue" / name / f"{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [header, row.format(one), row.format(other or usual)]
        path.write_text("".join(f"{line}\n" for line in lines if line))
    return path


def test_every_glue_task_is_tried():
    assert list(RELEASE) == list(GLUE_TASKS)


@pytest.mark.parametrize("name", RELEASE)
def test_glue_from_the_release(tmp_path, name):
    write_release(tmp_path, name)
    task = built(glue_task(name, tmp_path))
    _, _, one, other, texts = RELEASE[name]
    templates = [task.text, task.text_pair][: len(texts)]
    for rows in (task.rows("test"), sorted(task.rows("train"), key=task.rows("test").index)):
        assert [tuple(template(row) for template in templates) for row in rows] == [texts, texts]
        assert [row[task.spec.label] for row in rows] == [one, other]
    assert [task._target(row) for row in task.rows("test")] == (
        [3.8, 0.0] if name == "STS-B" else [task.labels.index(one), task.labels.index(other)]
    )
    assert task.metric == {"CoLA": "matthews", "STS-B": "pearson_spearman"}.get(name, "accuracy")


@pytest.mark.parametrize("name", RELEASE)
def test_glue_files_that_are_damaged(tmp_path, name):
    dev = write_release(tmp_path, name)
    whole = dev.read_text()
    start = 0 if name == "CoLA" else 1
    dev.write_text(whole[: -len(whole.splitlines()[-1]) + 4])
    with pytest.raises(ScaloraError, match=rf"{dev.name}, line {start + 2}: \d+ fields, but the first line has"):
        _ = built(glue_task(name, tmp_path)).splits
    if name != "STS-B":
        write_release(tmp_path, name, other="nonsense")
        with pytest.raises(ScaloraError, match=rf"is 'nonsense' in .*train\.tsv, line {start + 2}, row 2; use \["):
            _ = built(glue_task(name, tmp_path)).splits
    write_release(tmp_path, name).unlink()
    with pytest.raises(ScaloraError, match=rf"task\.data\.test: there is no file glue/{name}/{dev.name}"):
        _ = built(glue_task(name, tmp_path)).splits


@pytest.fixture
def hub(monkeypatch):
    """A hub of our own: {(repository, config, split): rows}."""
    import datasets

    content = {}

    def load_dataset(repository, config=None, *, split):
        return SimpleNamespace(features={}, to_list=lambda: content[repository, config, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return content


HUB_COLUMNS = {"QQP": ("question1", "question2"), "MNLI": ("premise", "hypothesis"), "QNLI": ("question", "sentence")}


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_glue_from_the_hub(hub, name):
    config = name.lower().replace("-", "")
    columns = HUB_COLUMNS.get(name, ("sentence",) if name in ("CoLA", "SST-2") else ("sentence1", "sentence2"))
    rows = [{**dict.fromkeys(columns, "a"), "label": label, "idx": label} for label in (0, 1)]
    hub["nyu-mll/glue", config, "train"] = rows
    hub["nyu-mll/glue", config, "validation_matched" if name == "MNLI" else "validation"] = rows
    task = built(glue_task(name, None))
    assert [row["label"] for row in task.rows("test")] == [0, 1]
    assert task.num_labels == {"STS-B": 1, "MNLI": 3}.get(name, 2)
    assert set(columns) < set(task.columns)
    if name != "STS-B":
        rows[1]["label"] = -1
        with pytest.raises(ScaloraError, match="the label is hidden: this split has no labels"):
            _ = built(glue_task(name, None)).splits


def test_validation_comes_from_train(tmp_path):
    write_release(tmp_path, "RTE")
    path = tmp_path / "glue" / "RTE" / "train.tsv"
    path.write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(f"{i}\ta{i}\tb\tentailment\n" for i in range(9)))
    task = built(glue_task("RTE", tmp_path, train_size=4, validation_size=3, test_size=1, max_length=99))
    assert [len(rows) for rows in task.splits] == [4, 3, 1]
    assert not {row["sentence1"] for row in task.splits.train} & {row["sentence1"] for row in task.splits.validation}
    assert task.spec.max_length == 99


# What is read and what is scored, for each choice, in the JSON form and in the hub's.
ASKED = {
    "BoolQ": (
        [("Question: is it?\nAnswer:", " yes"), ("Question: is it?\nAnswer:", " no")],
        [
            ("Ice is cold.\nQuestion: is it hot?\nAnswer:", " yes"),
            ("Ice is cold.\nQuestion: is it hot?\nAnswer:", " no"),
        ],
    ),
    "PIQA": (
        [("Question: How?\nAnswer: ", "a"), ("Question: How?\nAnswer: ", "b")],
        [("Question: boil eggs\nAnswer: ", "in water"), ("Question: boil eggs\nAnswer: ", "in air")],
    ),
    "SIQA": ([("Q: Kai ran. Why?\nA: ", choice) for choice in "abc"],) * 2,
    "HellaSwag": (
        [("Roof: How to mend. He ", choice) for choice in ("starts.", "b", "c", "d")],
        [("Roof: How to mend. A man sits. He ", choice) for choice in ("starts.", "stops.")],
    ),
    "WinoGrande": ([("S beat M, so S ", "won."), ("S beat M, so M ", "won.")],) * 2,
    "ARC-e": (
        [("Question: Why?\nAnswer: ", choice) for choice in "abcd"],
        [("Question: Why?\nAnswer: ", choice) for choice in "pq"],
    ),
    "ARC-c": (
        [("Question: Why?\nAnswer: ", choice) for choice in "abcde"],
        [("Question: Why?\nAnswer: ", choice) for choice in "pq"],
    ),
    "OBQA": ([("The sun ", choice) for choice in "abcd"], [("The sun ", choice) for choice in "pq"]),
}
ON_HUB = {
    "BoolQ": ("BoolQ", ("google/boolq", None, "validation")),
    "PIQA": ("PIQA", ("baber/piqa", None, "validation")),
    "SIQA": ("SIQA", ("lighteval/siqa", None, "validation")),
    "HellaSwag": ("HellaSwag", ("Rowan/hellaswag", None, "validation")),
    "WinoGrande": ("WinoGrande", ("allenai/winogrande", "winogrande_xl", "validation")),
    "ARC-e": ("ARC", ("allenai/ai2_arc", "ARC-Easy", "test")),
    "ARC-c": ("ARC", ("allenai/ai2_arc", "ARC-Challenge", "test")),
    "OBQA": ("OpenBookQA", ("allenai/openbookqa", "main", "test")),
}


def test_every_commonsense_set_is_tried():
    assert list(ASKED) == list(ON_HUB) == list(COMMONSENSE) == list(PROMPTS) == list(JSON)


def asked(task, split):
    row = task.rows(split)[0]
    choices = task._choices(row)
    return task._texts(row, choices), task._answer(row, choices)


@pytest.mark.parametrize("name", COMMONSENSE)
def test_commonsense_from_json(tmp_path, name):
    folder = tmp_path / "commonsense" / COMMONSENSE[name].folder
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps([record(name)]))
    task = built(commonsense_task(name, tmp_path))
    for split in ("train", "test"):
        assert asked(task, split) == (ASKED[name][0], JSON[name][2][2])
    (folder / "test.json").write_text(json.dumps([record(name)])[:-20])
    with pytest.raises(ScaloraError, match=r"test\.json, line 1: not valid JSON .* cut off"):
        _ = built(commonsense_task(name, tmp_path)).splits


@pytest.mark.parametrize("name", COMMONSENSE)
def test_commonsense_from_the_hub(hub, name):
    form, (repository, config, split) = ON_HUB[name]
    row, (_, _, answer) = HUB[form]
    hub[repository, config, "train"] = hub[repository, config, split] = [row]
    assert asked(built(commonsense_task(name, None)), "test") == (ASKED[name][1], answer)


def test_names_that_are_misspelt():
    with pytest.raises(ScaloraError, match="no GLUE task 'cola'; did you mean 'CoLA'"):
        glue_task("cola", None)
    with pytest.raises(ScaloraError, match="no commonsense set 'HelaSwag'; did you mean 'HellaSwag'"):
        commonsense_task("HelaSwag", None)
    with pytest.raises(ScaloraError, match="no GLUE task 'xyz'; there are CoLA, SST-2"):
        glue_task("xyz", None)


def test_partial_evaluation(tmp_path):
    """With a continuation, a choice is as good as it makes the text after it likely."""
    row = {"before": "the cat ", "after": "ran on", "choices": ["sat", "dog"], "answer": 1}
    path = tokenized.write_jsonl(tmp_path / "x.jsonl", [row])
    section = {"kind": "multiple_choice", "data": {"train": path, "test": path}, "prompt": "{before}{choice} "}
    task = built({**section, "continuation": "{after}"})
    model, tokenizer = tokenized.llama(), tokenized.tokenizer()
    score = task.score(model, tokenizer)
    found = []
    for choice in row["choices"]:
        ids = tokenizer(f"the cat {choice} ran on")["input_ids"]
        with torch.no_grad():
            logprobs = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(logprobs[i - 1, ids[i]].item() for i in (3, 4)))
    among = torch.tensor(found).log_softmax(0)
    assert score.metrics["nll"] == pytest.approx(-among[1].item(), rel=1e-4)
    assert score.predictions[0].predicted == row["choices"][int(among.argmax())]
    assert score.predictions[0].text == "the cat _ "
    example = task.train_dataset(tokenizer)[0]
    assert tokenizer.decode(example["input_ids"]) == "the cat dog ran on"
    assert example["labels"][:3] == [-100] * 3
    with pytest.raises(ScaloraError, match=r"with a continuation it must hold \{choice\}"):
        built({**section, "prompt": "{before}", "continuation": "{after}"})
