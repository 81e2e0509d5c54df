"""Rows from every kind of file and folder, every form, and what is refused."""

import json

import pytest

pytest.importorskip("datasets")

import datasets
import numpy
from PIL import Image

from loract import LoractError
from loract.config import TrainConfig
from loract.rows import class_names, converted, form_of, labelled, load_rows, split_rows
from training import write_rows

ROWS = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}, {"text": "three", "label": "a"}]


def options(name, **values):
    return TrainConfig(model_name_or_path="m", output_dir="o", dataset_name=str(name), **values)


def write(path, kind):
    rows = datasets.Dataset.from_list(ROWS)
    if kind == "jsonl":
        write_rows(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        rows.to_csv(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "arrow":
        rows.save_to_disk(path.parent / "saved")
        next((path.parent / "saved").glob("*.arrow")).rename(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_files(tmp_path, kind):
    found = load_rows(str(write(tmp_path / f"rows.{kind}", kind)), "train")
    assert [{k: row[k] for k in ("text", "label")} for row in found] == ROWS


def test_a_folder_of_files(tmp_path):
    write_rows(tmp_path / "a" / "1.jsonl", ROWS[:2])
    write_rows(tmp_path / "a" / "2.jsonl", ROWS[2:])
    assert load_rows(str(tmp_path / "a"), "train")["text"][:] == ["one", "two", "three"]


def test_text_files_are_a_row_each(tmp_path):
    (tmp_path / "1.txt").write_text("line\n\nline\n")
    (tmp_path / "2.txt").write_text("other")
    assert load_rows(str(tmp_path), "train")["text"][:] == ["line\n\nline\n", "other"]


def test_saved_datasets(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    assert len(load_rows(str(tmp_path / "both"), "test")) == 1
    assert len(load_rows(str(tmp_path / "one"), "train")) == 3
    with pytest.raises(LoractError, match=r"no split 'validation'.*train, test"):
        load_rows(str(tmp_path / "both"), "validation")


def test_images_by_class(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(numpy.zeros((4, 4), numpy.uint8)).save(tmp_path / name / "1.png")
    found = load_rows(str(tmp_path), "train")
    assert class_names(found, "label") == ["cat", "dog"]
    assert found[0]["image"].size == (4, 4)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/folder"])
def test_nothing_there(name):
    with pytest.raises(LoractError, match=r"does not exist.*check dataset_name"):
        load_rows(name, "train")


def test_a_name_without_a_hub():
    with pytest.raises(LoractError, match="dataset 'nobody/nothing'"):
        load_rows("nobody/nothing", "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": ""}, "without a row"),
        ({"a.jsonl": "{]"}, "readable rows"),
        ({"a.pkl": "x"}, "may hold a pickle"),
        ({"a.pt": "x", "b.jsonl": "{}"}, "may hold a pickle"),
        ({"a.jsonl": "{}", "b.csv": "a"}, r"with \.csv, \.jsonl.*one kind"),
        ({"a.xyz": "x"}, r"with \.xyz.*one kind"),
        ({}, "with nothing"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(LoractError, match=message):
        load_rows(str(tmp_path), "train")


FORMS = {
    "messages": ({"messages": [{"role": "user", "content": "hi"}]}, {"messages": [{"role": "user", "content": "hi"}]}),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    ),
    "prompt and completion": ({"prompt": "a", "completion": "b", "id": 1}, {"prompt": "a", "completion": "b"}),
    "Alpaca": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"prompt": "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n", "completion": "3"},
    ),
    "text": ({"text": "a", "source": "b"}, {"text": "a"}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    row, expected = FORMS[name]
    rows = datasets.Dataset.from_list([row])
    form = form_of(rows, "text")
    assert form.name == name
    (found,) = converted(rows, form)
    assert {k: list(v) if isinstance(v, list) else v for k, v in found.items()} == expected


def test_alpaca_without_input():
    rows = datasets.Dataset.from_list([{"instruction": "Sing", "input": "", "output": "la"}])
    assert converted(rows, form_of(rows, "text"))[0]["prompt"] == "### Instruction:\nSing\n\n### Response:\n"


def test_a_text_field_of_another_name():
    rows = datasets.Dataset.from_list([{"body": "a"}])
    assert converted(rows, form_of(rows, "body"))[0] == {"text": "a"}
    with pytest.raises(LoractError, match=r"columns body; expected columns messages.*text"):
        form_of(rows, "text")


def test_empty_cells_are_named():
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": None}])
    with pytest.raises(LoractError, match="row 1 without a value in 'text'"):
        form_of(rows, "text")


@pytest.mark.parametrize(
    ("values", "names"),
    [(["b", "a", "b"], ["a", "b"]), ([7, 3, 7], ["3", "7"]), ([True, False, True], ["False", "True"])],
)
def test_labels(values, names):
    rows = datasets.Dataset.from_dict({"text": ["x"] * 3, "label": values})
    assert class_names(rows, "label") == names
    assert labelled(rows, "label", names)["labels"][:] == [1, 0, 1]


def test_labels_that_are_none():
    rows = datasets.Dataset.from_dict({"label": [0.5, 1.5]})
    with pytest.raises(LoractError, match=r"labels like 0.5"):
        class_names(rows, "label")
    with pytest.raises(LoractError, match="label 'c' in the evaluation data"):
        labelled(datasets.Dataset.from_dict({"label": ["a", "c"]}), "label", ["a", "b"])


def test_splits(tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(10)])
    train, test = split_rows(options(name, val_set_size=0.3), 0)
    assert (len(train), len(test)) == (7, 3)
    assert sorted([*train["text"], *test["text"]]) == [str(i) for i in range(10)]
    again, _ = split_rows(options(name, val_set_size=3), 0)
    assert again["text"][:] == train["text"][:]
    train, test = split_rows(options(name, eval_dataset_name=name, max_train_samples=4, max_eval_samples=2), 0)
    assert (len(train), len(test)) == (4, 2)
    with pytest.raises(LoractError, match=r"val_set_size=10.* of 10 rows"):
        split_rows(options(name, val_set_size=10), 0)
