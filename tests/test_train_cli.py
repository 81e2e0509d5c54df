"""The verbs of a run as the shell sees them: output, exit status, one line for a mistake."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("trl")

from loract.cli import main
from loract.cli.app import app
from loract.config import load_config
from training import save_model, settings, texts, write_config, write_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:trl.*", "ignore::UserWarning:trl.*", "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def fails(monkeypatch, capsys, *arguments):
    """Message and exit status as the shell sees them."""
    monkeypatch.setattr(sys, "argv", ["loract", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return stopped.value.code, [line for line in error.splitlines() if line.startswith("loract: ")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def config(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", texts())
    return write_config(tmp_path / "c.yaml", settings(model, data, tmp_path / "run", max_steps=2, val_set_size=4))


def test_init_writes_a_valid_start(tmp_path, monkeypatch, capsys):
    path = tmp_path / "c.yaml"
    assert "loract validate" in run("init", path, "--task", "image-classification").output
    assert load_config(path).task == "image-classification"
    code, lines = fails(monkeypatch, capsys, "init", path)
    assert (code, len(lines)) == (2, 1)
    assert "which exists" in lines[0]
    code, (line,) = fails(monkeypatch, capsys, "init", tmp_path / "d.yaml", "--task", "text-clasification")
    assert "did you mean 'text-classification'" in line


def test_validate(config, tmp_path):
    result = run("validate", config)
    assert result.exit_code == 0
    assert "20 rows of text, 4 to evaluate" in result.output
    assert "valid" in result.output
    assert not (tmp_path / "run").exists()


def test_dry_run(config, tmp_path):
    result = run("train", config, "--dry-run", "--activation_compression.preset", "tensor")
    assert result.exit_code == 0
    assert yaml.safe_load(result.output)["activation_compression"]["preset"] == "tensor"
    assert "# 14 sites adapter_input: LowRank" in result.output
    assert "parameters train" in result.output
    assert not (tmp_path / "run").exists()


def test_train_resume_overwrite(config, tmp_path, monkeypatch, capsys):
    result = run("train", config)
    assert result.exit_code == 0
    for text in ("2 steps", "evaluation loss", "activations kept", "peak memory", "adapter"):
        assert text in result.output
    code, (line,) = fails(monkeypatch, capsys, "train", config)
    assert code == 2
    assert "--resume goes on, --overwrite starts again" in line
    assert run("train", config, "--resume", "--max_steps", "3").exit_code == 0
    assert run("train", config, "--overwrite").exit_code == 0
    assert run("export", tmp_path / "run", tmp_path / "merged").exit_code == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rte", "1"], "did you mean 'learning_rate'"),
        (["--activation_compression.preset", "sublayr"], "did you mean 'sublayer'"),
        (["--learning_rate", "fast"], "learning_rate='fast'"),
        (["--dataset_name", "/no/rows.jsonl"], "does not exist"),
        (["--dataset_text_field", "body"], "columns text"),
        (["--max_length", "1000"], "at most 256"),
        (["--model_name_or_path", "/no/model"], "model '/no/model'"),
        (["--resume"], "no run in"),
        (["--resume", "--overwrite"], "both --resume and --overwrite"),
        (["stray"], "pairs like"),
    ],
)
def test_a_mistake_is_one_line(config, tmp_path, monkeypatch, capsys, arguments, message):
    code, lines = fails(monkeypatch, capsys, "train", config, *arguments)
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]
    assert not list(tmp_path.glob("run/*"))


def test_ctrl_c_saves_and_says_how_to_go_on(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", texts())
    config = write_config(tmp_path / "c.yaml", settings(model, data, tmp_path / "run", max_steps=100000))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "loract", "train", config]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error[-3000:]
    assert "--resume goes on" in out
    assert "Traceback" not in error
    steps = [int(p.name.split("-")[1]) for p in (tmp_path / "run").glob("checkpoint-*")]
    assert steps
    assert not (tmp_path / "run" / "adapter").exists()
    again = subprocess.run(
        [*command, "--resume", "--max_steps", str(max(steps) + 1)], capture_output=True, text=True, env=environment
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resuming from checkpoint-{max(steps)}" in again.stderr
