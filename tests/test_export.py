"""Merged models load with plain transformers and say what the adapter says."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import peft
import transformers

from loract import LoractError
from loract.export import export
from training import save_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


@pytest.fixture
def adapter(tmp_path):
    """A run's folder with an adapter whose B is not zero."""
    base = save_model(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    spec = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, spec).eval()
    folder = tmp_path / "run" / "adapter"
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("named", ["run", "adapter"])
def test_merged_outputs(adapter, tmp_path, named):
    folder, model = adapter
    merged = export(folder.parent if named == "run" else folder, tmp_path / "merged")
    assert merged == 14
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not isinstance(loaded, peft.PeftModel)
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = loaded(input_ids=ids).logits, model(input_ids=ids).logits
        plain = model.unload()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (plain - theirs).abs().max() > 0.01
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("ab")["input_ids"] == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "merged", "run"]
    assert not list((tmp_path / "merged").glob("*.bin"))


def test_dtype(adapter, tmp_path):
    export(adapter[0], tmp_path / "merged", dtype="bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(LoractError, match="dtype 'int3'"):
        export(adapter[0], tmp_path / "other", dtype="int3")


def test_an_existing_folder_is_kept(adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(LoractError, match="which exists"):
        export(adapter[0], tmp_path / "merged")


def test_pickles_and_nothing(adapter, tmp_path):
    folder = adapter[0]
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(LoractError, match="a pickle"):
        export(folder, tmp_path / "merged")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(LoractError, match="no adapter in"):
        export(folder.parent, tmp_path / "merged")


def test_a_damaged_adapter_writes_nothing(adapter, tmp_path):
    weights = adapter[0] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(LoractError, match="one that fits its base"):
        export(adapter[0], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_missing_base(adapter, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(LoractError, match="one that fits its base"):
        export(adapter[0], tmp_path / "merged")


def test_an_error_while_writing_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        (Path(args[0]) / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(LoractError, match="No space left"):
        export(adapter[0], tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "run"]
