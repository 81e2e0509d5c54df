"""Merged models, quantised or not, load with plain transformers and say what the adapter says."""

import math
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import peft
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from loract import LoractError, MissingExtra
from loract.cli.app import app
from loract.data import standard_library
from loract.export import export
from loract.quantize import quantise
from training import TEXT, save_model

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
    done = export(folder.parent if named == "run" else folder, tmp_path / "merged")
    assert (done.merged, done.quantised, done.losses) == (14, 0, None)
    assert done.full_bytes == done.written_bytes == (tmp_path / "merged" / "model.safetensors").stat().st_size
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


# Quantised

CONFIGURATIONS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}
KINDS = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}
HALF_STEPS = {"int8": 0.5 / 127 + 2**-10, "nf4": 0.1521}
"""Of the widest step of each grid, as a share of the largest value; int8 starts from weights rounded to fp16."""
METHODS = sorted(KINDS)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def dense(model):
    """The same with 4-bit maps replaced by ordinary ones, so that no layout for inference matters."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            model.set_submodule(name, plain)
    return model


def surprise(model, text):
    """Mean negative log-probability of the text's characters, in blocks of 256 of the first 2048."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    ids = tokenizer(text, verbose=False)["input_ids"][:2048]
    found = []
    for start in range(0, len(ids), 256):
        block = ids[start : start + 256]
        chances = logits(model, torch.tensor([block]))[0].double().softmax(1)
        found += [-math.log(chances[i, token]) for i, token in enumerate(block[1:])]
    return sum(found) / len(found)


@pytest.mark.parametrize("method", METHODS)
def test_quantised(adapter, tmp_path, method):
    pytest.importorskip("bitsandbytes")
    auto, out = transformers.AutoModelForCausalLM, tmp_path / "small"
    text = (TEXT * 8)[:520]  # two blocks and a short one
    (tmp_path / "text").write_text(text)
    done = export(adapter[0], out, quantize=method, text=tmp_path / "text")
    assert (done.merged, done.quantised, done.tokens) == (14, 14, 520)
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run", "small", "text"]

    export(adapter[0], tmp_path / "merged")
    assert done.full_bytes == (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert done.written_bytes == (out / "model.safetensors").stat().st_size
    merged = auto.from_pretrained(tmp_path / "merged")
    small = auto.from_pretrained(out)
    layers = [module for module in small.modules() if type(module).__name__ == KINDS[method]]
    assert len(layers) == 14
    assert type(small.lm_head) is torch.nn.Linear
    assert torch.equal(small.model.embed_tokens.weight, merged.model.embed_tokens.weight)
    before, after = done.losses
    assert before == pytest.approx(surprise(merged, text), rel=1e-5)
    assert after == pytest.approx(surprise(dense(auto.from_pretrained(out)), text), rel=1e-5)
    assert before != after

    config = transformers.BitsAndBytesConfig(**CONFIGURATIONS[method])
    in_memory = auto.from_pretrained(tmp_path / "merged", quantization_config=config)
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(small, ids), logits(in_memory, ids))
    assert not torch.equal(logits(small, ids), logits(merged, ids))


@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_are_within_half_a_step(adapter, tmp_path, method):
    pytest.importorskip("bitsandbytes")
    export(adapter[0], tmp_path / "small", quantize=method, loss=False)
    export(adapter[0], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    stored = load_file(tmp_path / "small" / "model.safetensors")
    small = dense(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small"))
    names = [name for name in merged if name.endswith("proj.weight")]
    assert len(names) == 14
    for name in names:
        if method == "int8":
            ours = stored[name] * stored[name.replace("weight", "SCB")][:, None] / 127
        else:
            ours = small.get_parameter(name).detach()
        blocks = (-1, merged[name].shape[1] if method == "int8" else 64)
        weight, error = merged[name].reshape(blocks), (ours - merged[name]).reshape(blocks)
        assert (error.abs() <= HALF_STEPS[method] * weight.abs().amax(1, keepdim=True)).all()
        assert error.abs().max() > 0


def test_what_the_command_says(adapter, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "small"
    done = CliRunner().invoke(app, ["export", str(adapter[0]), str(out), "--quantize", "nf4"], catch_exceptions=False)
    export(adapter[0], tmp_path / "merged")
    first, weights, loss = done.output.splitlines()[-3:]
    assert first.endswith(
        f"14 layers merged, 14 in nf4, {sum(p.stat().st_size for p in out.iterdir()) / 2**20:.0f} MiB"
    )
    sizes = [(folder / "model.safetensors").stat().st_size / 2**20 for folder in (tmp_path / "merged", out)]
    assert weights == "weights {:.1f} -> {:.1f} MiB".format(*sizes)
    before, after, tokens = re.fullmatch(
        r"loss ([\d.]+) -> ([\d.]+) on ([\d,]+) tokens of held-out sources of Python's library", loss
    ).groups()
    assert tokens == "2,048"
    text = "".join(islice(standard_library("held_out"), 4))
    auto = transformers.AutoModelForCausalLM
    assert float(before) == pytest.approx(surprise(auto.from_pretrained(tmp_path / "merged"), text), abs=1e-4)
    assert float(after) == pytest.approx(surprise(dense(auto.from_pretrained(out)), text), abs=1e-4)

    arguments = ["export", str(adapter[0]), str(tmp_path / "again"), "--quantize", "int8", "--no-loss"]
    assert "loss" not in CliRunner().invoke(app, arguments, catch_exceptions=False).output


def test_a_classifier_is_quantised_but_for_its_head(tmp_path):
    pytest.importorskip("bitsandbytes")
    auto = transformers.AutoModelForSequenceClassification
    save_model(tmp_path / "base", "bert")
    spec = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False, task_type="SEQ_CLS")
    model = peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), spec)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "small"), "--quantize", "nf4"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.output.splitlines()[-1] == "no loss: not a causal language model"
    small = auto.from_pretrained(tmp_path / "small")
    assert torch.equal(small.classifier.weight, model.base_model.model.classifier.modules_to_save.default.weight)
    kinds = {type(module).__name__ for module in small.bert.encoder.modules() if not list(module.children())}
    assert "Linear4bit" in kinds
    assert "Linear" not in kinds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int7"}, "did you mean 'int8'"),
        ({"text": Path("text")}, "a text and no quantisation"),
        ({"quantize": "int8", "text": Path("/no/text")}, "No such file"),
        ({"quantize": "int8", "text": Path("/")}, "Is a directory"),
    ],
)
def test_mistakes(adapter, tmp_path, options, message):
    with pytest.raises(LoractError, match=message):
        export(adapter[0], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "message"), [(b"a", "1 tokens in .*at least 2"), (b"\xff\xfe", "not in UTF-8")])
def test_texts_that_are_none(adapter, tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(LoractError, match=message):
        export(adapter[0], tmp_path / "out", quantize="nf4", text=tmp_path / "text")
    assert not (tmp_path / "out").exists()


def test_without_bitsandbytes(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"no bitsandbytes.*pip install 'loract\[quantized\]'"):
        export(adapter[0], tmp_path / "out", quantize="nf4")
    assert export(adapter[0], tmp_path / "out").merged == 14


def test_without_a_tokenizer(adapter, tmp_path):
    pytest.importorskip("bitsandbytes")
    for path in adapter[0].glob("tokenizer*"):
        path.unlink()
    assert export(adapter[0], tmp_path / "with", quantize="int8").losses is not None  # the base's own
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(LoractError, match=r"no tokenizer in .*--no-loss"):
        export(adapter[0], tmp_path / "out", quantize="int8")
    assert export(adapter[0], tmp_path / "out", quantize="int8", loss=False).losses is None


def test_what_does_not_quantise_leaves_nothing(adapter, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    save, saved = transformers.PreTrainedModel.save_pretrained, []

    def full(self, folder, *args, **kwargs):
        saved.append(folder)
        if len(saved) == 2:  # the merged model found room, the quantised one does not
            (Path(folder) / "half").write_text("x")
            raise OSError(28, "No space left on device")
        return save(self, folder, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        with pytest.raises(LoractError, match="No space left"):
            export(adapter[0], tmp_path / "out", quantize="int8", loss=False)

    def refused(*args, **kwargs):
        raise ValueError("a kernel is missing")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.quantizers.quantizer_bnb_8bit.Bnb8BitHfQuantizer.validate_environment", refused)
        with pytest.raises(LoractError, match=r"does not quantise \(a kernel is missing\)"):
            export(adapter[0], tmp_path / "out", quantize="int8", loss=False)

    def cut(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        if Path(folder).parent == tmp_path:  # the quantised one
            (Path(folder) / "model.safetensors").write_bytes(b"half")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", cut)
        with pytest.raises(LoractError, match="does not load again"):
            export(adapter[0], tmp_path / "out", quantize="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_base_that_is_quantised_already(adapter, tmp_path):
    pytest.importorskip("bitsandbytes")
    auto = transformers.AutoModelForCausalLM
    export(adapter[0], tmp_path / "small", quantize="nf4", loss=False)
    with pytest.raises(LoractError, match="quantised already"):
        quantise(auto.from_pretrained(tmp_path / "small"), tmp_path, "int8")


def test_a_model_without_linear_layers(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=0, vocab_size=9)
    with pytest.raises(LoractError, match="without linear layers"):
        quantise(transformers.LlamaForCausalLM(config), tmp_path, "nf4")
    assert not list(tmp_path.iterdir())
