"""Examples of several processes, and the command that compares their losses, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from test_benchmarks import script
from training import losses, save_model, texts, write_rows

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_losses_of_one_process_and_of_two(model, capsys):
    found = script("processes").main(
        ["--steps", "3", "--length", "24", "--model_name_or_path", model, "--learning_rate", "1e-2"]
    )
    alone, ddp, fsdp = found.values()
    assert list(found) == ["one process", "2 processes, DDP", "2 processes, FSDP2"]
    assert len(alone) == 3
    assert alone[-1] < alone[0]
    assert ddp == pytest.approx(alone, rel=1e-2)
    assert fsdp == pytest.approx(ddp, rel=1e-3)
    assert f"| 1 | {alone[0]:.4f} | {ddp[0]:.4f} | {fsdp[0]:.4f} |" in capsys.readouterr().out


def test_accelerate_shards(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", texts())
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "accelerate_fsdp2.yaml")),
        *("-m", "loract", "train", str(EXAMPLES / "several_processes.yaml")),
        *("--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "run")),
        *("--max_length", "24", "--max_steps", "3", "--save_steps", "2", "--report_to", "none", "--logging_steps", "1"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoint-2" / "pytorch_model_fsdp.bin").exists()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
