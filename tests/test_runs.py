"""The run's folder: what is whole, what is damaged, what is refused."""

import errno
import json

import pytest

from loract import LoractError
from loract.runs import CONFIG, MANIFEST, Run, damage


@pytest.fixture
def run(tmp_path):
    run = Run(folder=tmp_path / "run")
    run.start(resume=False, overwrite=False)
    run.write(CONFIG, "a: 1\n")
    return run


def save(run, step, text="weights"):
    with run.saving(f"checkpoint-{step}") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)
    return run.folder / f"checkpoint-{step}"


def test_a_checkpoint_appears_whole(run):
    with run.saving("checkpoint-1") as folder:
        (folder / "file").write_text("x")
        assert run.checkpoints() == []
    assert [p.name for p in run.checkpoints()] == ["checkpoint-1"]
    assert sorted(p.name for p in run.folder.iterdir()) == ["checkpoint-1", CONFIG]
    assert damage(run.folder / "checkpoint-1") is None


def test_order_is_by_number_and_rotation_keeps_the_latest(run):
    for step in (2, 10, 9):
        save(run, step)
    assert [p.name for p in run.checkpoints()] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    run.rotate(2)
    assert [p.name for p in run.checkpoints()] == ["checkpoint-9", "checkpoint-10"]


def test_saving_again_replaces(run):
    save(run, 1, "old")
    save(run, 1, "new")
    assert (run.folder / "checkpoint-1" / "sub" / "file").read_text() == "new"
    assert damage(run.folder / "checkpoint-1") is None


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda p: (p / "sub" / "file").write_text("w3ights"), "sub/file has changed"),
        (lambda p: (p / "sub" / "file").write_text(""), "sub/file has changed"),
        (lambda p: (p / "sub" / "file").unlink(), "sub/file is missing"),
        (lambda p: (p / MANIFEST).unlink(), "is missing or damaged"),
        (lambda p: (p / MANIFEST).write_text("{"), "is missing or damaged"),
        (lambda p: (p / MANIFEST).write_text("[]"), "is missing or damaged"),
        (lambda p: (p / MANIFEST).write_text('{"../../config.yaml": [5, "x"]}'), "leads out of it"),
    ],
)
def test_damage_is_found_and_the_one_before_is_taken(run, harm, fault):
    first, second = save(run, 1), save(run, 2)
    harm(second)
    found, faults = run.last_good()
    assert found == first
    assert len(faults) == 1
    assert faults[0].startswith("checkpoint-2: ")
    assert fault in faults[0]
    with pytest.raises(LoractError, match="a damaged checkpoint, checkpoint-2"):
        run.checkpoint("checkpoint-2")


def test_a_linked_checkpoint_is_not_taken(run, tmp_path):
    outside = Run(folder=tmp_path / "other")
    outside.start(resume=False, overwrite=False)
    (run.folder / "checkpoint-9").symlink_to(save(outside, 9))
    assert run.last_good() == (None, ["checkpoint-9: is a link"])
    with pytest.raises(LoractError, match="which is not in"):
        run.checkpoint("checkpoint-9")


@pytest.mark.parametrize("name", ["../other/checkpoint-1", "/tmp/checkpoint-1", "..", ".", "config.yaml"])
def test_names_that_leave_the_folder(run, name):
    save(run, 1)
    with pytest.raises(LoractError, match=r"which is not in.*one of checkpoint-1"):
        run.checkpoint(name)


def test_a_name_that_is_not_there(run):
    with pytest.raises(LoractError, match="no checkpoint 'checkpoint-7'"):
        run.checkpoint("checkpoint-7")


def fail(run, name):
    with run.saving(name) as folder:
        (folder / "file").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_while_saving_leaves_what_was_there(run):
    save(run, 1)
    message = r"error while saving checkpoint-2 .*No space left.*goes on from checkpoint-1"
    with pytest.raises(LoractError, match=message):
        fail(run, "checkpoint-2")
    assert sorted(p.name for p in run.folder.iterdir()) == ["checkpoint-1", CONFIG]
    assert run.last_good()[0].name == "checkpoint-1"


def test_other_errors_pass(run):
    with pytest.raises(KeyError), run.saving("checkpoint-2"):
        raise KeyError("x")
    assert [p.name for p in run.folder.iterdir()] == [CONFIG]


def test_a_folder_in_use(run, tmp_path):
    with pytest.raises(LoractError, match=r"not empty.*--resume goes on"):
        run.start(resume=False, overwrite=False)
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(LoractError, match=r"not empty.*choose another"):
        Run(folder=other).start(resume=False, overwrite=False)
    with pytest.raises(LoractError, match="which is no run"):
        Run(folder=other).start(resume=False, overwrite=True)
    with pytest.raises(LoractError, match="no run in"):
        Run(folder=other).start(resume=True, overwrite=False)
    with pytest.raises(LoractError, match="both --resume and --overwrite"):
        run.start(resume=True, overwrite=True)
    assert (other / "thesis.txt").read_text() == "x"


def test_overwriting_empties_the_run_and_follows_no_link(run, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    save(run, 1)
    (run.folder / "link").symlink_to(outside)
    run.start(resume=False, overwrite=True)
    assert list(run.folder.iterdir()) == []
    assert (outside / "file").exists()


def test_what_a_kill_leaves_is_cleared(run):
    (run.folder / ".saving-checkpoint-3" / "checkpoint-3").mkdir(parents=True)
    (run.folder / ".removing-checkpoint-1").mkdir()
    run.start(resume=True, overwrite=False)
    assert [p.name for p in run.folder.iterdir()] == [CONFIG]


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoractError, match=r"output_dir.*Not a directory"):
        Run(folder=tmp_path / "file" / "run").start(resume=False, overwrite=False)


def test_metrics_of_steps_to_come_are_dropped(run):
    for step in (1, 2, 3):
        run.add_metrics({"step": step, "loss": 1 / step})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    assert [m["step"] for m in run.metrics()] == [1, 2, 3]
    run.forget_metrics_after(2)
    run.add_metrics({"step": 3, "loss": 1 / 3})
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": s, "loss": 1 / s} for s in (1, 2, 3)]
