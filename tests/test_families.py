"""Regions that run again in backward, on tiny random models of many architectures, with dropout."""

import functools

import pytest
import torch

import loract

tf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from architectures import build, output  # noqa: E402
from loract.memory import saved_bytes  # noqa: E402
from tiny import weights  # noqa: E402

CODECS = {"exact": (loract.Exact(), 1e-5), "full-rank": (loract.LowRank(rank=1.0, guard=False), 1e-4)}
BYTES = {"sublayer": 0.26, "layer": 0.125}  # most that an exact region keeps, of what autograd keeps
CHOOSES = "chooses by its inputs, and a coded input could choose otherwise"
REGIONS = ("sublayer", "layer")
EXACT = {name: loract.preset(name, codec=loract.Exact()) for name in REGIONS}

FAMILIES = {  # the last parts of the sublayers' names, and how many there are in all
    "llama": ("self_attn mlp", 4),
    "mistral": ("self_attn mlp", 4),
    "qwen3": ("self_attn mlp", 4),
    "phi3": ("self_attn mlp", 4),
    "gpt2": ("attn mlp", 4),
    "gptj": ("attn mlp", 4),
    "gpt_neox": ("attention mlp", 4),
    "bloom": ("self_attention mlp", 4),
    "falcon": ("self_attention mlp", 4),
    "opt": ("self_attn fc1 fc2", 6),
    "cohere": ("self_attn mlp", 4),
    "gemma2": ("self_attn mlp", 4),
    "gemma3": ("self_attn mlp", 4),
    "olmo2": ("self_attn mlp", 4),
    # The projection that ends a sublayer is in a module with the norm after it, which needs its value.
    "bert": ("self intermediate", 4),
    "roberta": ("self intermediate", 4),
    "modernbert": ("attn mlp", 4),
    "distilbert": ("attention ffn", 4),
    "vit": ("attention mlp", 4),
    "dinov2": ("attention mlp", 4),
    "clip": ("self_attn mlp", 4),
    "t5": ("SelfAttention EncDecAttention DenseReluDense", 10),
    "bart": ("self_attn encoder_attn fc1 fc2", 14),
    # Experts are a region; the router, beside them in their parent, is not.
    "mixtral": ("self_attn experts", 4),
    "qwen2_moe": ("self_attn experts shared_expert", 6),
    "qwen3_moe": ("self_attn experts", 4),
}


def last(model, batch, seed=7):
    torch.manual_seed(seed)
    return model(**batch).last_hidden_state


def gradients(model, out):
    weights(out).mul(out).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    a, b = (torch.cat([grads[name].flatten() for name in expected]) for grads in (ours, expected))
    assert (a - b).norm() <= tolerance * b.norm()


def assert_equal_training(model, forward, policy, tolerance):
    """Of the call that is tried, and of the next; the handle, detached."""
    reference = forward()
    expected, state = gradients(model, reference), torch.get_rng_state()
    with loract.attach(model, policy) as handle:
        for _ in range(2):
            ours = forward()
            assert torch.equal(ours, reference)
            assert_same(gradients(model, ours), expected, tolerance)
            assert torch.equal(torch.get_rng_state(), state)
    return handle


def calls(handle, kind):
    return {s.name: s.calls for s in handle.stats() if s.kind == kind}


def assert_runs_again(handle, preset, **counts):
    """Regions of the preset's kind act, those inside do not, and none was refused."""
    kinds = REGIONS[: REGIONS.index(preset) + 1]
    assert {kind: len(calls(handle, kind)) for kind in kinds} == {kind: counts[kind] for kind in kinds}
    assert handle.left == []
    assert all(calls(handle, preset).values())
    assert preset == "sublayer" or not any(calls(handle, "sublayer").values())


@functools.cache
def plain(family):
    """A model, its batch, and what autograd makes of them: bytes, output, gradients."""
    model, batch = build(family)
    size, out = saved_bytes(lambda: last(model, batch), model.parameters())
    assert not torch.equal(out, last(model, batch, seed=8)), "no dropout acts"
    return model, batch, size, out.detach(), gradients(model, out)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_regions_train_as_plain_autograd(family, preset, codec):
    model, batch, before, reference, expected = plain(family)
    chosen, tolerance = CODECS[codec]
    with loract.attach(model, loract.preset(preset, codec=chosen)) as handle:
        ours = last(model, batch)  # tried
        assert_same(gradients(model, ours), expected, tolerance)
        assert torch.equal(ours, reference)
        if codec == "exact":
            after, ours = saved_bytes(lambda: last(model, batch), model.parameters())
            assert after <= BYTES[preset] * before
            assert torch.equal(ours, reference)
            assert_same(gradients(model, ours), expected, tolerance)

    names, sublayers = FAMILIES[family]
    whole, parts = calls(handle, "layer"), calls(handle, "sublayer")
    assert len(whole) == (0 if preset == "sublayer" else 4 if "decoder_input_ids" in batch else 2)
    assert len(parts) == sublayers
    assert {name.rsplit(".", 1)[-1] for name in parts} == set(names.split())
    # A router that read a coded input could send a token elsewhere: the block is left, what is inside acts.
    refused = preset == "layer" and codec != "exact" and "experts" in names
    assert {(name, reason) for name, _, reason in handle.left} == {(name, CHOOSES) for name in whole if refused}
    acting, inert = (whole, parts) if preset == "layer" and not refused else (parts, whole)
    assert all(acting.values())
    assert not any(inert.values())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize(
    ("name", "sublayers"),  # torch's encoder has no module for its MLP, and a function as activation unless told
    [("torch_post_norm", 2), ("torch_pre_norm", 6), ("written", 4)],
)
def test_models_without_adapters(name, sublayers, preset, codec):
    model, batch = build(name)
    chosen, tolerance = CODECS[codec]

    def forward():
        return output(model, batch)

    handle = assert_equal_training(model, forward, loract.preset(preset, codec=chosen), tolerance)
    assert_runs_again(handle, preset, sublayer=sublayers, layer=2)


def test_recorded_router_logits_keep_their_gradient():
    model, batch = build("mixtral", tf.AutoModelForCausalLM, output_router_logits=True)

    def forward():
        torch.manual_seed(7)
        return model(**batch, labels=batch["input_ids"]).aux_loss

    handle = assert_equal_training(model, forward, EXACT["layer"], 1e-5)
    assert {name for name, _, reason in handle.left if "recorded" in reason} == set(calls(handle, "layer"))
    assert all(calls(handle, "sublayer").values())


@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize("family", ["llama", "bloom", "t5", "bart"])
def test_a_cache_begun_in_training(family, preset):
    model, batch = build(family)
    batch["use_cache"] = True
    handle = assert_equal_training(model, lambda: last(model, batch), EXACT[preset], 1e-5)
    assert handle.left == []


@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_filled_cache(family, preset):
    model, batch = build(family)
    start, rest = batch["input_ids"].split((10, 54), dim=1)

    def forward():
        torch.manual_seed(7)
        with torch.no_grad():
            cache = model(input_ids=start, use_cache=True).past_key_values
        out = model(input_ids=rest, past_key_values=cache, use_cache=True)
        assert out.past_key_values.get_seq_length() == 64
        return out.last_hidden_state

    assert_equal_training(model, forward, EXACT[preset], 1e-5)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize("case", ["autocast", "adapter-dropout", "hidden-states"])
def test_llama_trained_otherwise(case, preset, codec):
    model, batch = build("llama", dropout=0.1 if case == "adapter-dropout" else 0.0)

    def forward():
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
            out = model(**batch, output_hidden_states=case == "hidden-states")
        return out.last_hidden_state if case != "hidden-states" else torch.cat(out.hidden_states)

    chosen, tolerance = CODECS[codec]
    tolerance = 2e-2 if case == "autocast" else tolerance
    handle = assert_equal_training(model, forward, loract.preset(preset, codec=chosen), tolerance)
    assert_runs_again(handle, preset, sublayer=4, layer=2)


@pytest.mark.parametrize("preset", REGIONS)
def test_parametrized_weights_that_are_cached_beyond_a_call(preset):
    """A first run without a graph would leave them in the cache without theirs, and the gradient would be lost."""
    model, batch = build("written")
    for block in model.blocks:
        torch.nn.utils.parametrizations.weight_norm(block.mlp[0])

    def step():
        with torch.nn.utils.parametrize.cached():
            out = output(model, batch)
            return out.detach(), gradients(model, out)

    reference, expected = step()
    with loract.attach(model, EXACT[preset]) as handle:
        ours, found = step()
    assert torch.equal(ours, reference)
    assert_same(found, expected, 1e-5)
    refused = {name for name, _, reason in handle.left if "cached" in reason}
    layers = {f"blocks.{i}" for i in range(2)} if preset == "layer" else set()
    assert refused == layers | {f"blocks.{i}.mlp" for i in range(2)}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("preset", [*REGIONS, "balanced"])
def test_adapters_on_stacked_experts(preset, family):
    """PEFT makes whole adapted weights of them in each run, and autograd would keep these."""
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model, batch = build(family, targets=targets)
    before, reference = saved_bytes(lambda: last(model, batch), model.parameters())
    expected = gradients(model, reference)
    with loract.attach(model, EXACT.get(preset, preset)) as handle:
        for _ in range(2):
            after, ours = saved_bytes(lambda: last(model, batch), model.parameters())
            assert torch.equal(ours, reference)
            assert_same(gradients(model, ours), expected, 0.05 if preset == "balanced" else 1e-5)
        assert after <= 0.1 * before
    expected = FAMILIES[family][1] if preset != "layer" else 2
    assert sum(map(bool, calls(handle, "layer" if preset == "layer" else "sublayer").values())) == expected
