"""LoRA over an NF4 base (QLoRA): the same values, sites and gradients, at most half the bytes."""

import pytest
import torch

import loract

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

from causal import causal, lora, tokens  # noqa: E402
from loract.functions.linear import PACKS, dense_weight, packing  # noqa: E402
from loract.memory import saved_bytes  # noqa: E402
from tiny import FAMILIES  # noqa: E402

FULL = loract.preset("tensor", codec=loract.LowRank(rank=1.0, guard=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama on disk."""
    path = tmp_path_factory.mktemp("base")
    causal("llama").unload().save_pretrained(path)
    return path


def double(dtype):
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def int8(dtype):
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def torchao(dtype):
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quant_type=quantization.Int8WeightOnlyConfig())


def dynamic(dtype):
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quant_type=quantization.Int8DynamicActivationInt8WeightConfig())


BASES = [double, int8, torchao, dynamic]


def load(folder, config, dtype):
    """Adapters on every linear layer but the head."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    torch.manual_seed(0)
    return lora(base)


def quantised(folder, dtype=torch.float32):
    """Loaded in 4 bits as a user would."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = load(folder, config, dtype)
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == FAMILIES["llama"]["adapter_input"]
    return model


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def step(model, ids):
    """Logits and gradients."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("policy", "tolerance"), [("exact", 1e-5), (FULL, 1e-3)], ids=["exact", "full-rank"])
def test_values_sites_and_gradients(folder, policy, tolerance):
    model, ids = quantised(folder), tokens()
    logits, expected = step(model, ids)
    with loract.attach(model, policy) as handle:
        ours, gradients = step(model, ids)
        stats = handle.stats()
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, ours)
    assert handle.summary() == FAMILIES["llama"]
    assert torch.equal(ours, logits)
    assert (gradients - expected).norm() <= tolerance * expected.norm()
    assert all(s.calls for s in stats)
    if policy is FULL:
        uncoded = [s for s in stats if s.kind != "attention" and s.bytes_before and not s.coded]
        # Attention keeps its output exactly, so the projection after it holds that tensor for nothing.
        assert {(s.kind, s.name.rsplit(".")[-1], s.bytes_after) for s in uncoded} == {("adapter_input", "o_proj", 0)}


@pytest.mark.parametrize("policy", ["exact", "tensor"])
def test_presets_halve_the_bytes(folder, policy):
    model, ids = quantised(folder, torch.bfloat16), tokens(length=128)
    body = model.get_base_model().model
    forward = lambda: body(input_ids=ids, use_cache=False).last_hidden_state  # noqa: E731
    held = [*model.parameters(), *model.buffers()]
    plain, expected = saved_bytes(forward, held)
    with loract.attach(model, policy):
        ours, values = saved_bytes(forward, held)
    assert torch.equal(values, expected)
    assert 0 < ours <= 0.5 * plain


def test_the_base_stays_as_it_was(folder):
    model, ids = quantised(folder), tokens()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    with loract.attach(model, "tensor"):
        loss_of(model, ids).backward()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], value) and after[n].grad is None for n, value in before.items())
    assert all(type(after[n]) is bnb.nn.Params4bit for n in before if n.endswith("proj.base_layer.weight"))


def test_evaluation_leaves_gradients_alone(folder):
    """bitsandbytes packs a weight at its first evaluation, on CPUs with bf16 arithmetic: no gradient passes it then."""
    model, ids = quantised(folder, torch.bfloat16), tokens()
    _, expected = step(model, ids)

    def evaluate():
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        model.train()

    packs = [module for module in model.modules() if getattr(module, PACKS, False)]
    with loract.attach(model, "exact"):
        for _ in range(2):
            assert (step(model, ids)[1] - expected).norm() <= 1e-3 * expected.norm()
            evaluate()
    assert [module for module in model.modules() if getattr(module, PACKS, False)] == packs
    evaluate()  # outside: packed, and unpacked with scales that were rounded to bf16
    with loract.attach(model, "exact"):
        assert (step(model, ids)[1] - expected).norm() <= 0.15 * expected.norm()
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)


@pytest.mark.parametrize("nested", [True, False])
def test_a_packed_weight_is_changed_back(nested):
    torch.manual_seed(0)
    options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4", "compress_statistics": nested}
    module = bnb.nn.Linear4bit(256, 96, **options).to("cpu")
    before = dense_weight(module).float()
    with torch.no_grad():
        module.eval()(torch.randn(4, 256).bfloat16())
    packing(module)
    # What was packed has rounded its scales to bf16.
    assert (dense_weight(module).float() - before).norm() <= 4e-3 * before.norm()


@pytest.mark.parametrize("name", ["sublayer", "layer"])
def test_regions_in_sixteen_bits(folder, name):
    """PEFT rounds an adapter's product over a quantised base before it is added."""
    model, ids = quantised(folder, torch.bfloat16), tokens()
    logits, expected = step(model, ids)
    with loract.attach(model, loract.preset(name, codec=loract.Exact())) as handle:
        ours, gradients = step(model, ids)
        assert not handle.left
    assert torch.equal(ours, logits)
    assert (gradients - expected).norm() <= 3e-2 * expected.norm()


@pytest.mark.parametrize("name", ["sublayer", "layer"])
@pytest.mark.parametrize(("codec", "tolerance"), [(loract.Exact(), 1e-5), (FULL.rules[0].codec, 1e-3)])
def test_regions_over_four_bits(folder, monkeypatch, name, codec, tolerance):
    model, ids = quantised(folder), tokens()
    logits, expected = step(model, ids)
    supplied = []
    original = loract.region.supplied_linear
    monkeypatch.setattr(
        loract.region, "supplied_linear", lambda *a, read: supplied.append(read) or original(*a, read=read)
    )
    product = loract.region.adapted_linear
    merged = []
    monkeypatch.setattr(loract.region, "adapted_linear", lambda *a, read: merged.append(read) or product(*a, read=read))
    with loract.attach(model, loract.preset(name, codec=codec)) as handle:
        ours, gradients = step(model, ids)
    assert torch.equal(ours, logits)
    assert (gradients - expected).norm() <= tolerance * expected.norm()
    assert handle.summary()["sublayer"] == 4
    supplied += [read for read in merged if not read]  # with the adapter of the map in one product
    assert supplied.count(False) == {"sublayer": 4, "layer": 2}[name]  # trailing projections, dequantised for backward
    from_factors = isinstance(codec, loract.LowRank) and name == "sublayer"
    assert supplied.count(True) == (10 if from_factors else 0)  # q, k, v, gate and up of two layers


WANTED = {  # the least that every base allows, and the error of a gradient
    "exact": ("exact", 1e-5, 0.9),
    "full-rank": (FULL, 1e-3, None),
    "balanced": ("balanced", 0.05, 0.12),
    "sublayer": (loract.preset("sublayer", codec=loract.Exact()), 1e-5, 0.18),
}


@pytest.mark.parametrize("policy", WANTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_other_bases(folder, base, dtype, policy):
    """Every site acts, sublayers run again, values stay, whoever multiplies by the base."""
    chosen, tolerance, share = WANTED[policy]
    tolerance = max(tolerance, 0.02) if dtype == torch.bfloat16 else tolerance
    model, ids = load(folder, base(dtype), dtype), tokens()
    held = [*model.parameters(), *model.buffers()]
    body = model.get_base_model().model
    logits, expected = step(model, ids)
    before, _ = saved_bytes(lambda: body(input_ids=ids, use_cache=False).last_hidden_state, held)
    with loract.attach(model, chosen) as handle:
        for _ in range(2):
            ours, gradients = step(model, ids)
            assert torch.equal(ours, logits)
            assert (gradients - expected).norm() <= tolerance * expected.norm()
        after, _ = saved_bytes(lambda: body(input_ids=ids, use_cache=False).last_hidden_state, held)
    assert handle.left == []
    again = policy in ("balanced", "sublayer")
    assert all(s.calls for s in handle.stats() if not again or s.kind in ("sublayer", "stream", "norm"))
    assert share is None or after <= share * before


def test_four_bits_run_again_in_bf16(folder):
    """As QLoRA trains: PEFT rounds what the adapter adds before it is added."""
    model, ids = quantised(folder, torch.bfloat16), tokens()
    logits, _ = step(model, ids)
    with loract.attach(model, "balanced") as handle:
        assert torch.equal(step(model, ids)[0], logits)
    assert handle.left == []
    assert sum(s.calls for s in handle.stats() if s.kind == "sublayer") == 4
