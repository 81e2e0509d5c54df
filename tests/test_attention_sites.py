"""Attention sites: q, k and v coded, and outputs kept for regions that run again."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import loract
import tiny
from loract import Exact, LowRank, Policy, Quantized, Rule
from loract.attention import Blockwise
from loract.functions import attention, attention_blocks
from oracles import relative

FULL = LowRank(rank=1.0, guard=False)
BYTE = Quantized(bits=8)
FAMILIES = ["llama", "qwen3", "gemma3", "gpt2", "bert", "vit"]


def policy(*rules):
    others = (Rule(kind=kind, codec=Exact()) for kind in ("adapter_input", "norm", "gated"))
    return Policy(name="mine", rules=(*rules, *others))


def grads(model, batch):
    model.zero_grad()
    out = tiny.run(model, batch)
    return out, tiny.grads(model)


def parts(handle):
    return [s for s in handle.stats() if s.kind == "attention" and s.name.rsplit(".", 1)[-1] in PARTS]


PARTS = ("query", "key", "value")


class Plain(nn.Module):
    """Attention written by hand, grouped heads, beside a residual sum."""

    def __init__(self, causal=True):
        super().__init__()
        self.causal = causal
        self.norm = nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).split((32, 16, 16), -1)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


# -- q, k and v ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_the_exact_gradient_and_the_same_values(family):
    model, batch = tiny.build(family, length=24)
    if "input_ids" in batch and family != "vit":
        batch["attention_mask"] = (torch.arange(24) < torch.tensor([[24], [17]])).long()
    plain, exact = grads(model, batch)
    with loract.attach(model, policy(Rule(kind="attention", codec=FULL))) as handle:
        out, ours = grads(model, batch)
        coded = parts(handle)
    assert torch.equal(out, plain)
    assert [s.name.rsplit(".", 1)[-1] for s in coded] == [*PARTS, *PARTS]  # two layers
    assert all(s.coded and s.calls == 1 and s.error is not None for s in coded)
    assert tiny.error(ours, exact) < 1e-5


def test_grouped_heads_are_kept_once():
    model, batch = tiny.build("llama", length=64)
    with loract.attach(model, policy(Rule(kind="attention", codec=BYTE))) as handle:
        tiny.run(model, batch)
        sizes = [s.bytes_before for s in parts(handle)]
        after = sum(s.bytes_after for s in parts(handle))
    assert sizes == [2 * 64 * width * 4 for width in (64, 32, 32)] * 2
    assert after < 0.35 * sum(sizes)


def test_bits_order_the_errors_and_bytes():
    model, batch = tiny.build("qwen3", length=64)
    _, exact = grads(model, batch)
    errors, sizes = [], []
    for bits in (8, 6, 4):
        with loract.attach(model, policy(Rule(kind="attention", codec=Quantized(bits=bits)))) as handle:
            errors.append(tiny.error(grads(model, batch)[1], exact))
            sizes.append(sum(s.bytes_after for s in handle.stats() if s.kind == "attention"))
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)
    assert errors[0] < 0.02


def test_a_rule_for_one_layer_leaves_the_others_exact():
    model, batch = tiny.build("llama")
    rules = (Rule(kind="attention", codec=BYTE, layers=(1, 1)), Rule(kind="attention", codec=Exact()))
    with loract.attach(model, policy(*rules)) as handle:
        tiny.run(model, batch)
        assert {s.name.split(".")[-3] for s in parts(handle)} == {"1"}


def test_dropout_stays_exact():
    model, batch = tiny.build("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    torch.manual_seed(3)
    plain, exact = grads(model, batch)
    with loract.attach(model, policy(Rule(kind="attention", codec=BYTE))) as handle:
        torch.manual_seed(3)
        out, ours = grads(model, batch)
        assert not any(s.calls for s in parts(handle))
    assert torch.equal(out, plain)
    assert tiny.error(ours, exact) < 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_attention_written_by_hand_is_coded_too(causal):
    torch.manual_seed(0)
    model = nn.Sequential(Plain(causal), Plain(causal))
    x = torch.randn(2, 20, 32)

    def step():
        model.zero_grad()
        out = model(x)
        tiny.weights(out).mul(out).sum().backward()
        return out.detach(), tiny.grads(model)

    plain, exact = step()
    with loract.attach(model, policy(Rule(kind="attention", codec=FULL))) as handle:
        out, ours = step()
        coded = parts(handle)
    assert torch.equal(out, plain)
    assert [s.name for s in coded] == [f"{i}.{part}" for i in (0, 1) for part in PARTS]
    assert all(s.coded for s in coded)
    assert tiny.error(ours, exact) < 1e-5
    again, _ = step()  # detached
    assert torch.equal(again, plain)


# -- outputs kept for a region ------------------------------------------------------------------------------------


def outputs(codec, kind="sublayer"):
    return policy(
        Rule(kind="attention_output", codec=codec),
        Rule(kind=kind, codec=Exact()),
        Rule(kind="attention", codec=Exact()),
    )


@pytest.fixture
def computed(monkeypatch):
    """Calls that compute an output in blocks; every length is long enough for blocks."""
    calls = []
    original = attention_blocks.output
    monkeypatch.setattr(attention, "output", lambda operands: calls.append(operands) or original(operands))
    monkeypatch.setattr(loract.attention, "SHORTEST", 1)
    return calls


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in FAMILIES for kind in ("sublayer", "layer") if (family, kind) != ("bert", "sublayer")],
)
def test_kept_outputs_are_not_computed_again_and_cost_nothing_in_the_gradient(family, kind, computed):
    model, batch = tiny.build(family, length=24)
    plain, exact = grads(model, batch)
    without = outputs(Exact(), kind)
    without = Policy(name="without", rules=without.rules[1:])
    with loract.attach(model, without):
        tiny.run(model, batch)
    assert len(computed) == 2
    computed.clear()
    with loract.attach(model, outputs(Exact(), kind)) as handle:
        out, ours = grads(model, batch)
        kept = [s for s in handle.stats() if s.kind == "attention_output" and s.calls]
    assert torch.equal(out, plain)
    assert not computed
    assert len(kept) == 2
    assert tiny.error(ours, exact) < 1e-5


def test_errors_of_outputs_stay_local(computed):
    model, batch = tiny.build("gemma3", length=64)
    _, exact = grads(model, batch)
    with loract.attach(model, outputs(Quantized(bits=4))) as handle:
        _, ours = grads(model, batch)
        kept = [s for s in handle.stats() if s.kind == "attention_output" and s.calls]
    assert all(s.coded for s in kept)
    assert sum(s.bytes_after for s in kept) < 0.2 * sum(s.bytes_before for s in kept)
    assert tiny.error(ours, exact) < 0.05
    for name, gradient in exact.items():  # what the output feeds reads it; q, k and v do not
        if "q_proj" in name:
            assert relative(ours[name], gradient) < 0.05


def test_an_output_that_others_read_is_computed(computed):
    """BERT's norm rebuilds its input from the region's output, which a lossy value inside must not change."""
    model, batch = tiny.build("bert", length=24)
    _, exact = grads(model, batch)
    with loract.attach(model, outputs(Quantized(bits=2, guard=False))) as handle:
        _, ours = grads(model, batch)
        assert any(s.coded for s in handle.stats() if s.kind == "attention_output")
    assert tiny.error(ours, exact) < 1e-5
    assert computed


@pytest.mark.parametrize("passes", [2, 3])
def test_kept_outputs_survive_a_retained_graph(passes, computed):
    model, batch = tiny.build("llama", length=24)
    with loract.attach(model, "fast"):
        out = model(**batch).last_hidden_state
        score = (tiny.weights(out) * out).sum()
        found = []
        for index in range(passes):
            model.zero_grad()
            score.backward(retain_graph=index < passes - 1)
            found.append(tiny.grads(model))
    assert not computed
    for later in found[1:]:
        assert tiny.error(later, found[0]) < 1e-6


def test_fast_keeps_the_outputs_of_attention_and_a_bit_more_of_the_stream(computed):
    model, batch = tiny.build("llama", length=64)
    found = {}
    for name in ("balanced", "fast"):
        with loract.attach(model, name) as handle:
            tiny.run(model, batch)
            found[name] = {s.kind: 0 for s in handle.stats()}
            for s in handle.stats():
                found[name][s.kind] += s.bytes_after
    more = found["fast"].pop("attention_output")
    steps = found["fast"].pop("stream") - found["balanced"].pop("stream")
    assert found["fast"] == found["balanced"]
    assert steps == 4 * 2 * 64 * 64 // 8  # four steps of 2 x 64 tokens of 64 features
    assert 0 < more < 2 * 2 * 64 * 64 * 4 / 3


def test_the_mode_computes_what_was_not_kept():
    q = torch.randn(1, 2, 300, 8, requires_grad=True)
    with Blockwise():
        out = functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(out, functional.scaled_dot_product_attention(q, q, q))
