"""Estimates against steps that are run: the same bytes without values, weights or a device."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import loract
from loract.budget import partly_again
from loract.cli.app import app
from loract.cli.estimate import METHODS
from loract.codecs import Exact
from loract.compare import Variant, contend, whole_step
from loract.estimate import CARDS, GIB, Depths, Ghost, NeedsValues, Setup, StandIn, estimate, usable
from loract.formula import formula
from loract.policy import preset
from loract.shapes import SHAPES, Shape, architecture, read_shape, shape
from loract.workload import Classification, Workload

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 512,
}
GEMMA = {**LLAMA, "head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
VIT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64}
SMALL = {
    "llama": Shape(name="llama", model_type="llama", config=LLAMA),
    "qwen3": Shape(name="qwen3", model_type="qwen3", config={**LLAMA, "head_dim": 16}),
    "gemma3": Shape(name="gemma3", model_type="gemma3_text", config=GEMMA),
    "bert": Shape(name="bert", model_type="bert", inputs="text", config={**LLAMA, "hidden_dropout_prob": 0.0}),
    "vit": Shape(name="vit", model_type="vit", inputs="images", config=VIT),
}
VARIANTS = (
    Variant(name="plain"),
    Variant(name="checkpointing", checkpointing=1),
    *(Variant(name=name, policy=preset(name)) for name in loract.policy.PRESETS),
    Variant(name="layer exact", policy=preset("layer", codec=Exact())),
)


def real(setup):
    """A model with values and a batch for it, as `Ghost` has them without."""
    work = Ghost(setup).work
    config = architecture(setup.shape)
    causal = setup.shape.inputs == "tokens"
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    torch.manual_seed(0)
    model = auto.from_config(config, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[setup.base])
    if setup.lora_rank is not None:
        import peft

        task = "CAUSAL_LM" if causal else None
        options = peft.LoraConfig(r=setup.lora_rank, target_modules="all-linear", task_type=task)
        model = peft.get_peft_model(model, options)
    model.train()
    ids = torch.randint(3, 97, (setup.batch, setup.length))
    if causal:
        base = model.get_base_model() if setup.lora_rank is not None else model
        return Workload(model=model, head=base.get_output_embeddings().weight, train=ids, held_out=ids), ids
    images = setup.shape.inputs == "images"
    rows = torch.randn(setup.batch, 3, 64, 64).to(next(model.parameters()).dtype) if images else ids
    labels = torch.zeros(setup.batch, dtype=torch.long)
    head = torch.randn(work.head.shape)
    batch = rows, labels
    return Classification(model=model, name=work.name, head=head, inputs=rows, labels=labels, held_out=batch), batch


def measured(work, batch, variant):
    contender = contend(work.model, variant)
    try:
        return whole_step(contender.model, work, batch)
    finally:
        contender.close()


@pytest.mark.parametrize(
    ("family", "base", "length"),
    [
        ("llama", "fp32", 64),
        ("llama", "bf16", 300),
        ("qwen3", "bf16", 64),
        ("gemma3", "bf16", 300),
        ("bert", "fp32", 64),
        ("vit", "bf16", 17),
    ],
)
def test_estimates_are_what_a_step_takes(family, base, length):
    setup = Setup(shape=SMALL[family], batch=2, length=length, lora_rank=4, base=base, device="cpu")
    ghost, (work, batch) = Ghost(setup), real(setup)
    for variant in VARIANTS:
        found = ghost.measure(variant)
        saved, peak = measured(work, batch, variant)
        assert found.saved_bytes == pytest.approx(saved, rel=0.03), variant.name
        assert found.step_bytes == pytest.approx(peak, rel=0.05), variant.name


def test_all_weights_trained():
    setup = Setup(shape=SMALL["llama"], batch=2, length=64, lora_rank=None, base="fp32", device="cpu")
    work, batch = real(setup)
    found = estimate(setup, Variant(name="plain"))
    saved, peak = measured(work, batch, Variant(name="plain"))
    size = sum(p.numel() for p in work.model.parameters())
    assert found.saved_bytes == pytest.approx(saved, rel=0.01)
    assert found.step_bytes == pytest.approx(peak, rel=0.02)
    assert (found.trained_bytes, found.gradients_bytes, found.optimiser_bytes) == (4 * size, 4 * size, 8 * size)


PARAMETERS = {  # of the published checkpoints, in millions
    "llama-3.2-1b": 1235.8,
    "llama-3.1-8b": 8030.3,
    "llama-3.1-70b": 70553.7,
    "qwen3-0.6b": 596.0,
    "qwen3-4b": 4022.5,
    "qwen3-8b": 8190.7,
    "qwen3-32b": 32762.1,
    "gemma-3-1b": 999.9,
    "gemma-3-4b": 3880.1,
    "gemma-3-12b": 11765.8,
    "mistral-7b": 7248.0,
    "phi-4": 14659.5,
    "mixtral-8x7b": 46702.8,
    "modernbert-base": 149.0,
    "vit-b-16": 86.4,
    "vit-l-16": 304.4,
}


RUN = ("llama-3.1-70b", "gemma-3-1b", "phi-4", "mixtral-8x7b", "modernbert-base", "vit-l-16")
"""One of each architecture; the others differ in sizes."""


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_parameters_of_the_published_models(name):
    config = architecture(SHAPES[name])
    auto = transformers.AutoModelForCausalLM if SHAPES[name].inputs == "tokens" else transformers.AutoModel
    with torch.device("meta"):
        model = auto.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], rel=0.002)


@pytest.mark.parametrize("name", RUN)
def test_shapes_can_be_run(name):
    depths = Depths(Setup(shape=SHAPES[name], batch=1, length=256))
    plain, balanced = (depths.peak(v, 1, 256) for v in (VARIANTS[0], Variant(name="b", policy=preset("balanced"))))
    weights = 2e6 * PARAMETERS[name]
    assert weights < balanced < 1.01 * plain
    assert balanced - weights < 0.7 * (plain - weights)


@pytest.mark.parametrize("family", ["llama", "gemma3", "vit"])
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[1], Variant(name="b", policy=preset("balanced"))])
def test_depth_is_extrapolated_exactly(family, variant):
    deeper = {"num_hidden_layers": 9}
    if family == "gemma3":  # its kinds of layers alternate
        kinds = GEMMA["layer_types"][:2] * 5
        deeper = {"layer_types": kinds[:9]} | deeper
    found = replace(SMALL[family], config=SMALL[family].config | deeper)
    setup = Setup(shape=found, batch=2, length=128, lora_rank=4)
    depths = Depths(setup)
    assert depths.shallow == ((3, 5) if family == "gemma3" else (2, 3))
    ours, whole = depths.measure(variant), estimate(setup, variant)
    for name in ("weights_bytes", "trained_bytes", "optimiser_bytes", "gradients_bytes", "saved_bytes", "step_bytes"):
        assert getattr(ours, name) == pytest.approx(getattr(whole, name), rel=1e-4), name


def test_a_policy_that_names_layers_is_run_at_its_depth():
    found = replace(SMALL["llama"], config=SMALL["llama"].config | {"num_hidden_layers": 8})
    setup = Setup(shape=found, batch=2, length=128, lora_rank=4)
    policy = partly_again(0, 7)[0]
    variant = Variant(name="some", policy=policy)
    assert Depths(setup).measure(variant) == estimate(setup, variant)


def test_room_is_what_fits_and_one_more_does_not():
    setup = Setup(shape=SMALL["llama"], batch=8, length=512, lora_rank=4)
    depths, variant = Depths(setup), Variant(name="b", policy=preset("balanced"))
    budgets = [depths.peak(variant, count, 512) + 1000 for count in (9, 30)]
    assert [room.batch for room in depths.room(variant, budgets)] == [9, 30]
    tiny, huge = depths.room(variant, [1000, 1 << 40])
    assert (tiny.batch, tiny.length) == (0, 0)
    assert huge.length == 512  # the model's positions


def test_room_of_images_has_no_length():
    (room,) = Depths(Setup(shape=SMALL["vit"], batch=2, lora_rank=4)).room(VARIANTS[0], [1 << 30])
    assert room.batch > 2
    assert room.length is None


@pytest.mark.parametrize(("base", "bits"), [("nf4", 4 + 32 / 64), ("int8", 8)])
def test_quantised_bases_take_their_codes(base, bits):
    dense, coded = (Ghost(Setup(shape=shape("llama-3.2-1b"), batch=1, length=64, base=b), 2) for b in ("bf16", base))
    linears = [m for m in coded.work.model.modules() if isinstance(m, StandIn)]
    numbers = sum(m.in_features * m.out_features for m in linears)
    assert len(linears) == 2 * 7
    saved = dense.measure(VARIANTS[0]).weights_bytes - coded.measure(VARIANTS[0]).weights_bytes
    assert saved == pytest.approx(numbers * (16 - bits) / 8, rel=0.002)


def test_nothing_is_left_substituted():
    before = nn.functional.scaled_dot_product_attention, torch.autocast
    with pytest.raises(ZeroDivisionError), Ghost(Setup(shape=SMALL["llama"], batch=1, length=8)).active():
        raise ZeroDivisionError
    assert (nn.functional.scaled_dot_product_attention, torch.autocast) == before


def test_a_model_that_asks_for_values_is_named(monkeypatch):
    ghost = Ghost(Setup(shape=SMALL["llama"], batch=1, length=8))
    monkeypatch.setattr(ghost.work.model, "forward", lambda **_: torch.empty(3, device="meta").sum().item())
    monkeypatch.setattr(type(ghost.work), "loss", lambda self, model, batch: model.forward(input_ids=batch))
    with pytest.raises(NeedsValues, match=r"_local_scalar_dense.* needs values"):
        ghost.measure(VARIANTS[0])


@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-3-1b"])
def test_the_formula_is_rough(name):
    setup = Setup(shape=shape(name), batch=4, length=2048)
    for variant in METHODS[:2]:
        by_formula, run = formula(setup, variant), estimate(setup, variant)
        assert by_formula.weights_bytes == pytest.approx(run.weights_bytes, rel=0.02)
        assert by_formula.trained_bytes == pytest.approx(run.trained_bytes, rel=0.02)
        assert by_formula.peak_bytes == pytest.approx(run.peak_bytes, rel=0.4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"base": "nf5"}, "base 'nf5'.*did you mean 'nf4'"),
        ({"optimiser": "adam"}, "optimiser 'adam'.*did you mean"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"base": "nf4", "lora_rank": None}, "all weights trained"),
    ],
)
def test_setups_are_checked(change, message):
    with pytest.raises(loract.InvalidSpec, match=message):
        Setup(shape=SMALL["llama"], **change)


def test_unknown_shapes_list_the_near_ones():
    with pytest.raises(loract.InvalidSpec, match=r"Llama-3.1-7B.*llama-3.2-1b, llama-3.1-8b.*did you mean"):
        shape("meta-llama/Llama-3.1-7B")
    assert shape("meta-llama/Llama-3.1-8B").name == "llama-3.1-8b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[]", "no object"),
        ("{}", "without model_type, a width, a number of layers, a number of heads"),
        (json.dumps({"model_type": "llama", "hidden_size": 8}), "without a number of layers"),
        (json.dumps({k: v for k, v in LLAMA.items() if k != "vocab_size"} | {"model_type": "llama"}), "vocab_size"),
        (json.dumps({**LLAMA, "model_type": "lama"}), "model_type 'lama'"),
    ],
)
def test_bad_configurations_are_explained(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(loract.LoractError, match=message):
        architecture(read_shape(tmp_path / "config.json"))


def test_a_saved_configuration_is_read(tmp_path):
    architecture(SMALL["llama"]).save_pretrained(tmp_path)
    found = shape(str(tmp_path))
    assert (found.model_type, found.inputs) == ("llama", "tokens")
    assert architecture(found).hidden_size == 64
    architecture(SMALL["vit"]).save_pretrained(tmp_path / "vit")
    assert shape(str(tmp_path / "vit")).inputs == "images"


def run(*arguments):
    return CliRunner().invoke(app, ["estimate", *arguments], catch_exceptions=False)


@pytest.fixture
def two_methods(monkeypatch):
    module = importlib.import_module("loract.cli.estimate")
    monkeypatch.setattr(module, "METHODS", (METHODS[0], METHODS[-1]))


def test_the_command(tmp_path, two_methods):
    architecture(SMALL["llama"]).save_pretrained(tmp_path)
    result = run(str(tmp_path), "--batch", "2", "--length", "256")
    assert result.exit_code == 0
    assert all(text in result.output for text in ("loract smallest", "fits on", "largest batch", "longest sequence"))


def test_the_command_prints_json(tmp_path, two_methods):
    architecture(SMALL["llama"]).save_pretrained(tmp_path)
    found = json.loads(run(str(tmp_path), "--batch", "2", "--length", "256", "--json").output)
    plain, smallest = found["estimates"]
    assert smallest["peak_bytes"] < plain["peak_bytes"]
    assert set(found["room"]["plain"]) == set(CARDS)
    assert found["formula"] is None


def test_the_command_reads_a_runs_configuration(tmp_path):
    architecture(SMALL["llama"]).save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ndataset_name: x\noutput_dir: y\nlora_r: 8\nmax_length: 128\n"
        "per_device_train_batch_size: 3\nactivation_compression: {preset: smallest}\n"
    )
    found = json.loads(run(str(tmp_path / "run.yaml"), "--no-limits", "--json").output)
    assert found["setup"] | {"batch": 3, "length": 128, "lora_rank": 8} == found["setup"]
    names = [e["name"] for e in found["estimates"]]
    assert names[0] == "this configuration"
    assert "loract smallest" not in names


def test_the_command_falls_back_to_a_formula(tmp_path, monkeypatch):
    def refuse(self, variant):
        raise NeedsValues("llama, in which nonzero needs values", "x", "y")

    monkeypatch.setattr(Ghost, "measure", refuse)
    architecture(SMALL["llama"]).save_pretrained(tmp_path)
    assert "By formula" in run(str(tmp_path)).output


def test_cards():
    assert usable(24) < 24 * GIB
    assert list(CARDS.values()) == sorted(CARDS.values())
