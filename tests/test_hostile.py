"""Files that are damaged or hostile: one line for whatever is wrong with them, and nothing in them is ever run."""

import json
import os
import pickle
import re
import shutil
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("trl")

import datasets

import loract
from loract.config import Compression, TrainConfig, load_config
from loract.plainyaml import written
from loract.rows import converted, form_of, load_rows, require_images
from loract.runs import CONFIG, MANIFEST, METRICS, Run, damage, seal
from loract.starters import STARTERS
from loract.tasks import prepare
from loract.train import train
from test_fuzz import fuzz
from test_train_cli import fails
from training import WARNINGS, image_settings, save_model, settings, texts, write_config, write_rows

pytestmark = pytest.mark.filterwarnings(*WARNINGS)
LONGEST = 2000
"""Characters that a message may have."""


def explained(run):
    """What `run` returns, or None where it refuses with one line."""
    try:
        return run()
    except loract.LoractError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < LONGEST
        assert "; expected " in message
        return None


class Mine:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", texts())


# Configurations

ODD = st.sampled_from(
    [None, "", "x" * 500, "\0", "a\nb", "~nobody/x", "../..", [], {}, [[]], -1, 0, 10**40, 1e308, True]
)
VALUES = st.recursive(
    ODD | st.integers(-9, 9) | st.floats(allow_nan=True) | st.text(string.printable, max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from([*TrainConfig.model_fields, "learning_rte", ""])
BLOCK = st.sampled_from([*Compression.model_fields, "prest"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@fuzz(150)
@given(st.dictionaries(KEYS, VALUES, max_size=3), st.dictionaries(BLOCK, VALUES, max_size=2))
def test_values_of_configurations(folder, values, block):
    values = settings("m", "d", "o") | ({"activation_compression": block} if block else {}) | values
    path = folder / "values.yaml"
    path.write_text(written(values), encoding="utf-8")
    config = explained(lambda: load_config(path))
    if config is not None:
        path.write_text(config.yaml(), encoding="utf-8")
        assert load_config(path).yaml() == config.yaml()


MARKS = st.sampled_from(
    [*"{}[]:,-!&*#?|>'\"%@`\n\t \\<=~", "!!", "&a ", "*a", "\n  ", ": ", "<<: ", "---\n", "0x_", "\u2028"]
)


@st.composite
def damaged(draw, text):
    """A text with a few insertions and deletions."""
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + (draw(MARKS) if draw(st.booleans()) else "") + text[at + draw(st.integers(0, 3)) :]
    return text


POLICY = """policy: mine
rules:
- {kind: norm, name: '*.q', layers: [0, 5], codec: {type: LowRank, rank: 0.25, sampler: {type: Sampled, power: 1}}}
- {kind: stream, recomputed: false, codec: {type: Quantized, bits: 7, scale: channel, outliers: 16}}
"""


@fuzz(150)
@given(damaged(STARTERS["text-generation"]), damaged(POLICY))
def test_damaged_texts(folder, config, policy):
    path = folder / "damaged.yaml"
    path.write_text(config, encoding="utf-8")
    explained(lambda: load_config(path))
    path.write_text(policy, encoding="utf-8")
    explained(lambda: loract.load_policy(path))


@fuzz(100)
@given(
    st.sampled_from(["Exact", "LowRank", "Quantized", "Transform"]),
    st.dictionaries(
        st.sampled_from(["rank", "bits", "group", "scale", "tolerance", "refresh", "outliers", "sampler", "guard"]),
        VALUES,
        max_size=2,
    ),
    VALUES,
)
def test_values_of_policies(folder, codec, fields, value):
    path = folder / "policy.yaml"
    path.write_text(written({"rules": [{"kind": "norm", "codec": {**fields, "type": codec}}]}))
    policy = explained(lambda: loract.load_policy(path))
    if policy is not None:  # what is taken works
        policy.rules[0].codec.encode(torch.ones(4, 8))
    for rule in ({"kind": "norm", "codec": value}, {"kind": value, "codec": {"type": "Exact"}}, value):
        path.write_text(written({"rules": [rule]}))
        assert explained(lambda: loract.load_policy(path)) is None


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nlearning_rate: *b\n"
TRICKS = {
    "a date": ("a: 2024-13-45", None),
    "half a number": ("a: 0x_", "invalid literal"),
    "a long number": ("a: " + "9" * 5000, "4300"),
    "a tag": ("a: !!int x", "tag 'tag:yaml.org,2002:int'"),
    "an object": ("a: !!python/object/new:os.system [touch x]", "tag 'tag:yaml.org,2002:python/object/new:os.system'"),
    "a module": ("a: !!python/module:antigravity", "tag .*python/module"),
    "a cycle": ("a: &a {b: *a}", "alias 'a'"),
    "a bomb": (BOMB, "alias 'a'"),
    "a merge": ("a: &a {b: 1}\nc: {<<: *a}", "alias 'a'"),
    "without end": ("a: " + "[" * 5000, "nested too deeply"),
    "two documents": ("a: 1\n---\nb: 2", "single document"),
    "a key of lists": ("? [a]\n: 1", "unhashable"),
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("read", [load_config, loract.load_policy], ids=["config", "policy"])
def test_tricks_of_yaml(tmp_path, monkeypatch, read, trick):
    text, message = TRICKS[trick]
    monkeypatch.chdir(tmp_path)
    Path("file.yaml").write_text(text)
    with pytest.raises(loract.LoractError, match=message or "no key|unknown key"):
        read("file.yaml")
    assert os.listdir() == ["file.yaml"]


@pytest.mark.parametrize("text", ["2024-13-45", "2024-01-31", "0x_", "[", "!!python/name:os.system", "*a"])
def test_values_on_the_command_line_are_text_where_they_are_no_yaml(tmp_path, text):
    path = write_config(tmp_path / "c.yaml", settings("m", "d", "o"))
    assert load_config(path, ["--output_dir", text]).output_dir == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "~nobody-here/rows.jsonl"}, "home directory"),
        ({"dataset_name": "x" * 300}, "too long"),
        ({"dataset_name": "a\0b"}, "null byte"),
        ({"output_dir": "x" * 300}, "too long"),
        ({"output_dir": "a\0b"}, "null byte"),
        ({"model_name_or_path": "x" * 300}, "too long"),
        ({"model_name_or_path": ""}, "model"),
        ({"config_overrides": {"hidden_size": "wide"}}, "hidden_size"),
        ({"config_overrides": {"num_attention_heads": 5}}, "model"),
        ({"lr_scheduler_type": "lineer"}, "transformers refuses"),
        ({"optim": "adamv"}, "transformers refuses"),
        ({"chat_template_path": "."}, "a Jinja file"),
    ],
    ids=str,
)
def test_values_that_name_what_cannot_be(model, data, tmp_path, monkeypatch, capsys, changes, message):
    values = {**settings(model, data, tmp_path / "run"), **changes}
    path = write_config(tmp_path / "c.yaml", values)
    code, lines = fails(monkeypatch, capsys, "train", path)
    assert (code, len(lines)) == (2, 1)
    assert re.search(message, lines[0])


# Data

CELLS = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(string.ascii_letters, max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner, max_size=3)
    ),
    max_leaves=5,
)
COLUMNS = ("text", "messages", "conversations", "prompt", "completion", "instruction", "input", "output")


@fuzz(30)
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), CELLS, min_size=1, max_size=3), min_size=1, max_size=3))
def test_rows_of_any_shape(folder, rows):
    name = write_rows(folder / "rows.jsonl", rows)

    def read():
        found = load_rows(name, "train")
        form = form_of(found, "text")
        return form, list(converted(found, form))

    result = explained(read)
    if result is not None and not result[0].chat:
        assert all(isinstance(value, str) for row in result[1] for value in row.values())


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"conversations": [{"role": "user", "content": "a"}]}], {}, "row 0 that is no ShareGPT .*from"),
        ([{"conversations": "user: a"}], {}, "row 0 that is no ShareGPT"),
        ([{"prompt": "a", "completion": 3}], {}, "column 'completion' of int64"),
        ([{"text": ["a"]}], {}, "column 'text' of list"),
        ([{"instruction": "a", "output": {"b": 1}}], {}, "column 'output' of struct"),
        ([{"text": 3, "label": "a"}], {"task": "text-classification"}, "column 'text' of int64"),
        ([{"text": "x", "label": ["a"]}], {"task": "text-classification"}, r"labels like \['a'\]"),
        ([{"text": "x", "label": {"a": 1}}], {"task": "text-classification"}, "labels like"),
        ([{"image": "x.png", "label": "a"}], {"task": "image-classification"}, "column 'image' of string"),
    ],
    ids=str,
)
def test_rows_that_are_no_data(model, tmp_path, rows, changes, message):
    name = write_rows(
        tmp_path / "rows.jsonl", [*rows, {**rows[0], "label": "b"} if rows[0].get("label") == "a" else rows[0]]
    )
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}")
    values = settings(model, name, tmp_path / "run", chat_template_path=str(tmp_path / "template.jinja"), **changes)
    config = TrainConfig(**values)
    with pytest.raises(loract.LoractError, match=message) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)


def test_an_empty_label_in_the_evaluation_data():
    from loract.rows import labelled

    with pytest.raises(loract.LoractError, match="label '' in the evaluation data"):
        labelled(datasets.Dataset.from_dict({"label": ["a", ""]}), "label", ["a", "b"])


IMAGES = {"truncated": lambda raw: raw[:40], "text": lambda _: b"no image", "empty": lambda _: b""}


@pytest.mark.parametrize("harm", IMAGES)
@pytest.mark.parametrize("late", [False, True], ids=["first", "late"])
def test_damaged_images(tmp_path, monkeypatch, harm, late):
    """Among the first rows they are found before anything is loaded, later ones when they are read."""
    import numpy
    from PIL import Image

    for label in ("dark", "light"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            picture = numpy.random.default_rng(i).integers(0, 255, (8, 8), numpy.uint8)
            Image.fromarray(picture).save(tmp_path / "images" / label / f"{i}.png")
    victim = tmp_path / "images" / "light" / "2.png"
    victim.write_bytes(IMAGES[harm](victim.read_bytes()))
    values = image_settings(tmp_path, 16, 1, max_steps=6, per_device_train_batch_size=2)
    if late:
        monkeypatch.setattr("loract.tasks.PROBED_ROWS", 1)
    message = r"at step \d; expected data to read" if late else "row 5 with an image"
    with pytest.raises(loract.LoractError, match=message):
        train(prepare(TrainConfig(**values)))


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.pth", "rows.bin", "rows.npy"])
def test_pickled_data_are_refused_unread(tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(pickle.dumps(Mine(tmp_path / "ran")))
    for source in (tmp_path / "data", tmp_path / "data" / name):
        with pytest.raises(loract.LoractError, match="may hold a pickle"):
            load_rows(str(source), "train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "rows.arrow", "rows.txt", "image.png"])
def test_a_pickle_under_another_name_is_not_run(tmp_path, name):
    path = tmp_path / "data" / name
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Mine(tmp_path / "ran")))
    if name == "image.png":
        explained(lambda: require_images(load_rows(str(path.parent), "train"), "image", 1))
    else:
        explained(lambda: [*load_rows(str(path.parent), "train")] and None)
    assert not (tmp_path / "ran").exists()


# Models


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("harm", ["empty", "cut", "garbage", "a list", "a pickle"])
def test_damaged_model_folders(model, data, tmp_path, name, harm):
    folder = shutil.copytree(model, tmp_path / "model")
    raw = (folder / name).read_bytes()
    harmed = {
        "empty": b"",
        "cut": raw[: len(raw) // 2],
        "garbage": bytes(range(256)),
        "a list": b"[]",
        "a pickle": pickle.dumps(Mine(tmp_path / "ran")),
    }[harm]
    (folder / name).write_bytes(harmed)
    config = TrainConfig(**settings(folder, data, tmp_path / "run"))
    result = explained(lambda: prepare(config).load())
    assert result is None or name == "tokenizer_config.json"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused_unread(model, data, tmp_path, name):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Mine(tmp_path / "ran")))
    with pytest.raises(loract.LoractError, match=f"{name}, a pickle"):
        prepare(TrainConfig(**settings(folder, data, tmp_path / "run")))
    assert not (tmp_path / "ran").exists()


@fuzz(60)
@given(
    st.dictionaries(
        st.sampled_from(
            ["model_type", "text_config", "hidden_size", "num_hidden_layers", "architectures", "vocab_size"]
        ),
        VALUES,
        max_size=3,
    )
)
def test_shapes_of_any_values(folder, values):
    from loract.shapes import architecture, read_shape

    whole = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    path = folder / "config.json"
    path.write_text(json.dumps({**whole, **values}))
    explained(lambda: architecture(read_shape(path)))


def test_a_damaged_adapter_is_not_exported(model, tmp_path):
    from loract.export import export

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(pickle.dumps(Mine(tmp_path / "ran")))
    for text in (
        "[]",
        "{}",
        json.dumps({"base_model_name_or_path": model, "peft_type": "LORA", "task_type": "CAUSAL_LM"}),
    ):
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
        assert explained(lambda: export(tmp_path / "adapter", tmp_path / "out")) is None
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


# Runs and checkpoints


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """A run of four steps with two checkpoints."""
    values = settings(model, data, tmp_path_factory.mktemp("run") / "run", max_steps=4)
    values["activation_compression"] = {"preset": "tensor", "rank": 0.25, "audit_every": 0}
    train(prepare(TrainConfig(**values)))
    return values


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that may be harmed, its values, and what resumes it from its last checkpoint."""
    shutil.copytree(finished["output_dir"], tmp_path / "run")
    values = {**finished, "output_dir": str(tmp_path / "run"), "max_steps": 5}
    return tmp_path / "run", lambda: train(prepare(TrainConfig(**values)), resume=True)


def resealed(folder):
    """With sums that are right again."""
    (folder / MANIFEST).unlink()
    seal(folder)


STATE = "loract_state_0.json"
TORCH = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize("name", TORCH)
def test_a_pickle_in_a_sealed_checkpoint_is_refused_unread(run, tmp_path, name):
    """Sums cannot tell who wrote a checkpoint: torch reads these files as weights alone."""
    folder, resume = run
    last = folder / "checkpoint-4"
    torch.save({"x": Mine(tmp_path / "ran")}, last / name)
    resealed(last)
    with pytest.raises(loract.LoractError, match=r"checkpoint-4, which cannot be read \(a pickle that is no weights"):
        resume()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "notes.txt"])
def test_a_file_that_was_not_saved_with_the_checkpoint(run, tmp_path, name):
    folder, resume = run
    (folder / "checkpoint-4" / name).write_bytes(pickle.dumps(Mine(tmp_path / "ran")))
    assert damage(folder / "checkpoint-4") == f"{name} was not saved with it"
    assert resume().finished  # from the one before
    assert not (tmp_path / "ran").exists()


def cut(raw):
    return raw[: len(raw) // 2]


HARM = {"cut": cut, "a list": lambda _: b"[]"}


@pytest.mark.parametrize("name", [*TORCH, "adapter_model.safetensors", "trainer_state.json", STATE])
@pytest.mark.parametrize("harm", HARM)
def test_damaged_files_in_a_sealed_checkpoint(run, name, harm):
    folder, resume = run
    path = folder / "checkpoint-4" / name
    path.write_bytes(HARM[harm](path.read_bytes()))
    resealed(path.parent)
    assert explained(resume) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("sites"),
        lambda state: state.update(sites=[]),
        lambda state: state.update(loss="x"),
        lambda state: state.update(counters=3),
        lambda state: state.update(metrics=3),
        lambda state: next(iter(state["sites"].values())).update(step="x"),
        lambda state: next(iter(state["sites"].values())).update(spectrum=[1.0], dtype="save"),
        lambda state: next(iter(state["sites"].values())).update(memory={"basis": {"bytes": "?", "dtype": "load"}}),
        lambda state: next(iter(state["sites"].values())).pop("memory"),
    ],
    ids=range(9),
)
def test_states_that_are_none(run, change):
    folder, resume = run
    path = folder / "checkpoint-4" / STATE
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    resealed(path.parent)
    assert explained(resume) is None


def test_a_state_sets_no_other_attribute(run, monkeypatch):
    folder, resume = run
    path = folder / "checkpoint-4" / STATE
    state = json.loads(path.read_text())
    state["counters"]["save_model"] = 3
    path.write_text(json.dumps(state))
    resealed(path.parent)
    assert resume().finished


@pytest.mark.parametrize(
    "text", ["[", "- a", "", "a: 1", "activation_compression: 3", "a: !!python/name:os.system", "\0"]
)
def test_a_run_whose_configuration_is_damaged(run, text):
    folder, resume = run
    (folder / CONFIG).write_text(text)
    result = explained(resume)
    assert (result is not None) == (text == "a: 1")


LINES = ("[]", "3", "{}", '{"step": "x"}', '{"step": null}', "[" * 5000, '{"step": 3', '\xff{"step": 3}')


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_lines_of_metrics_that_are_none(tmp_path, line):
    run = Run(folder=tmp_path)
    run.add_metrics({"step": 1, "loss": 2.0})
    with (tmp_path / METRICS).open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    assert run.metrics() == [{"step": 1, "loss": 2.0}]
    run.forget_metrics_after(5)
    assert run.metrics() == [{"step": 1, "loss": 2.0}]


MANIFESTS = ("[" * 5000, '{"a": 3}', '{"a": [1, 2, 3]}', '{"/etc/passwd": [1, "x"]}', '{"a\\u0000": [1, ""]}')


@pytest.mark.parametrize("manifest", MANIFESTS, ids=range(len(MANIFESTS)))
def test_manifests_that_are_none(tmp_path, manifest):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / MANIFEST).write_text(manifest)
    assert damage(folder)


def test_links_inside_a_checkpoint_are_not_followed(run, tmp_path):
    folder, _ = run
    last = folder / "checkpoint-4"
    secret = tmp_path / "secret.json"
    (last / "trainer_state.json").rename(secret)
    (last / "trainer_state.json").symlink_to(secret)
    assert damage(last) == "trainer_state.json leads out of it"
    with pytest.raises(loract.LoractError, match=r"a damaged checkpoint, checkpoint-4: trainer_state\.json leads out"):
        Run(folder=folder).checkpoint("checkpoint-4")


@fuzz(100)
@given(st.lists(st.sampled_from([*"./\\~0129", "checkpoint-", "run", "..", "\0"]), max_size=8).map("".join))
def test_names_of_checkpoints_never_leave_the_run(folder, name):
    run = Run(folder=folder / "named" / "run")
    if not run.folder.exists():
        run.start(resume=False, overwrite=False)
        outside = Run(folder=folder / "named" / "other")
        for each in (run, outside):
            with each.saving("checkpoint-1") as saved:
                (saved / "file").write_text("x")
    found = explained(lambda: run.checkpoint(name))
    assert found is None or found.resolve() == (run.folder / "checkpoint-1").resolve()


def test_a_run_that_is_a_link_is_overwritten_in_its_place(tmp_path):
    run = Run(folder=tmp_path / "run")
    run.start(resume=False, overwrite=False)
    run.write(CONFIG, "a: 1\n")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    Run(folder=tmp_path / "link").start(resume=False, overwrite=True)
    assert list((tmp_path / "run").iterdir()) == []
