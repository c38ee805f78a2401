"""Labels for images: where they lie, which cannot be read, what is computed of them, and whole runs."""

import json
import shutil

import pandas
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTForImageClassification

from helpers import images, whole_runs, workspace
from scalora.common.errors import ScaloraError
from scalora.common.quiet import quiet
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Interrupted, train
from scalora.tasks import build_task
from scalora.tasks.data.rows import digest_rows
from scalora.tasks.image_classification import ImageClassificationSpec


def task(train, data=None, **fields):
    data = {"train": str(train), "test": str(train), **(data or {})}
    return build_task(ImageClassificationSpec(data=data, **fields))


@pytest.fixture
def folder(tmp_path):
    return images.lay(tmp_path / "photos", 9)


def test_a_folder_for_each_class(folder):
    (folder / "red" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (folder / "red" / "deep").mkdir()
    shutil.move(folder / "red" / "2.png", folder / "red" / "deep" / "2.PNG")
    built = task(folder)
    assert built.labels == ["blue", "green", "red"]
    rows = built.rows("test")
    assert [str(row["image"]) for row in rows][-1] == "red/deep/2.PNG"
    assert rows[0].place == f"{folder}, blue/0.png"
    copy = folder.parent / "elsewhere"
    shutil.copytree(folder, copy)
    assert digest_rows(task(copy).rows("test")) == digest_rows(rows)


def test_metadata_names_the_images(folder):
    names = [f"{colour}/{path.name}" for colour in images.COLOURS for path in sorted((folder / colour).iterdir())]
    rows = [{"file_name": name, "label": name.split("/")[0].upper()} for name in names]
    pandas.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    built = task(folder)
    assert built.labels == ["BLUE", "GREEN", "RED"]
    assert built.rows("test")[3].place == f"{folder}, line 5, row 4"
    rows[2]["file_name"] = "red/none.png"
    pandas.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    with pytest.raises(ScaloraError, match=r"the image 'red/none\.png' of .*photos, line 4, row 3 cannot be read"):
        _ = task(folder).splits
    assert len(task(folder, {"max_bad_rows": 1}).rows("test")) == 8
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text(json.dumps({"file": "x"}) + "\n")
    with pytest.raises(ScaloraError, match=r"metadata\.jsonl: there is no column file_name"):
        _ = task(folder).splits


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_name_images_or_hold_them(folder, ending):
    files = sorted(folder.rglob("*.png"))
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    if ending != "parquet":
        cells = [str(file.relative_to(folder.parent)) for file in files]
    frame = pandas.DataFrame({"picture": cells, "label": [i % 2 for i in range(9)]})
    path = folder.parent / f"rows.{ending}"
    if ending == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        (frame.to_csv if ending == "csv" else frame.to_parquet)(path, index=False)
    data = {"folder": str(folder.parent), "columns": {"image": "picture"}}
    built = task(path, data, labels=["cat", "dog"])
    dataset = built.train_dataset(images.processor(), "test")
    assert [each["labels"] for each in dataset] == [i % 2 for i in range(9)]
    with Image.open(files[3]) as wanted:
        assert dataset[3]["image"].tobytes() == wanted.tobytes()
    assert dataset.content() == task(folder).train_dataset(images.processor(), "test").content()


def test_the_hubs_images_stay_bytes(folder, monkeypatch):
    import datasets

    found = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    built = task("owner/photos", labels=["blue", "green", "red"])
    rows = built.rows("test")
    assert set(rows[0]["image"]) == {"bytes", "path"}
    assert sorted(each["labels"] for each in built.train_dataset(images.processor())) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_images_that_cannot_be_read_are_malformed(folder):
    damaged = folder / "blue" / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (folder / "red" / "2.png").write_text("no image")
    with pytest.raises(ScaloraError, match=r"task\.image: no image can be read in .*photos, blue/0\.png"):
        _ = task(folder).splits
    built = task(folder, {"max_bad_rows": 2})
    assert len(built.rows("test")) == 7
    assert "2 of 9 rows are malformed and are left out (max_bad_rows); the first" in built.notes[0]
    with pytest.raises(ScaloraError, match="2 of 9 rows are malformed, and max_bad_rows is 1"):
        _ = task(folder, {"max_bad_rows": 1}).splits


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["train/red", "test/red"], "holds the splits test, train, and no classes: name the folder of one of them, as"),
        (["notes"], "is a folder without folders of images"),
    ],
)
def test_folders_that_are_none_of_images(tmp_path, made, message):
    for name in made:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / ("x.txt" if name == "notes" else "x.png")).write_text("")
    with pytest.raises(ScaloraError, match=message):
        _ = task(tmp_path / "data").splits


def test_scores_are_those_of_the_logits(folder):
    built, model, processor = task(folder, metric="f1"), images.vit(3).eval(), images.processor()
    score = built.score(model, processor, batch_size=4)
    pixels = processor(images=[Image.open(row["image"].path) for row in built.rows("test")], return_tensors="pt")
    with torch.no_grad():
        logprobs = model(**pixels).logits.log_softmax(-1)
    targets = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert score.metrics["accuracy"] == (logprobs.argmax(-1) == targets).double().mean().item()
    assert score.metrics["nll"] == pytest.approx(-logprobs[torch.arange(9), targets].mean().item(), rel=1e-5)
    assert score.primary == "f1"
    assert [(p.text, p.expected) for p in score.predictions][:2] == [("blue/0.png", "blue"), ("blue/3.png", "blue")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    quiet()
    folder = tmp_path_factory.mktemp("images")
    images.vit().save_pretrained(folder / "model")
    images.processor().save_pretrained(folder / "model")
    images.lay(folder / "photos")
    return whole_runs.documented("image_classification", folder)


INPUTS = {"pixel_values": torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def test_a_whole_run(recipe, tmp_path):
    whole_runs.check_run(recipe, INPUTS, tmp_path, "nll", "accuracy")
    saved = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert saved.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size == {"height": 8, "width": 8}


def test_with_other_methods(recipe, tmp_path):
    whole_runs.check_other_methods(recipe, INPUTS, tmp_path)


def test_other_images_are_not_resumed_on(recipe, tmp_path):
    run = load_recipe(recipe, [f"output={tmp_path / 'run'}"])
    with workspace.stopped_at(3), pytest.raises(Interrupted):
        train(run)
    changed = next((recipe.parent / "photos").rglob("*.png"))
    kept = changed.read_bytes()
    images.picture(77).save(changed)
    try:
        with pytest.raises(ScaloraError, match=r"the data of (train|validation|test) are others"):
            train(run, resume=True)
    finally:
        changed.write_bytes(kept)


def test_mistakes_get_one_line(recipe):
    assert "no column 'picture' in" in whole_runs.refused(recipe, "task.image=picture")
    assert "did you mean 'image'?" in whole_runs.refused(recipe, "task.imag=x")
    assert "is not one of the labels" in whole_runs.refused(recipe, "task.labels=[blue, green]")
    said = whole_runs.refused(recipe, "model=smollm2-135m-instruct")
    assert "cannot be a image-classification model" in said or "image-classification" in said
