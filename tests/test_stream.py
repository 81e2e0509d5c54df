"""The residual stream in coded steps: closed loop, both directions, lifetimes, what is recognised, and second runs."""

import copy
import gc
import itertools

import peft
import pytest
import torch
import transformers
from torch import nn

import loract
import tiny
from loract import Exact, Policy, Quantized, Rule
from loract.functions.adapted import adapted_linear, in_place, merge, single_adapter
from loract.linalg import promote
from loract.memory import saved_bytes
from loract.stream import Chain
from oracles import relative

INDEX = 4
"""Bytes of a kept token's number."""
BYTE = Quantized(bits=8, scale="channel")


def streamed(codec):
    exact = (Rule(kind=kind, codec=Exact()) for kind in ("sublayer", "adapter_input", "norm", "gated", "attention"))
    return Policy(name="streamed", rules=(Rule(kind="stream", codec=codec), *exact))


def score(model, batch):
    out = model(**batch).last_hidden_state
    return (tiny.weights(out) * out).sum()


def plain(model, batch):
    model.zero_grad()
    score(model, batch).backward()
    return tiny.grads(model)


def bytes_by_name(handle):
    return {s.name.removeprefix("base_model.model."): s.bytes_after for s in handle.stats() if s.kind == "stream"}


# -- the chain ----------------------------------------------------------------------------------------------------


def walk(codec, steps=12, tokens=64, features=16, dtype=torch.float32):
    """Positions of a random walk, and the chain that coded them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    chain, positions = Chain(state=x.to(promote(x).dtype, copy=True)), [x]
    for _ in range(steps):
        x = x + torch.randn(tokens, features, generator=generator).to(dtype)
        chain.push(x, codec.encode)
        positions.append(x)
    return chain, positions


def test_errors_do_not_add_up():
    """Each position is within half a step of its own code, as if it had been coded alone."""
    chain, positions = walk(Quantized(bits=4, scale="channel"))
    last = positions[-1]
    previous = chain.decode(len(positions) - 2, torch.float32)
    half = (last - previous).abs().amax(0) / 7 / 2
    assert ((chain.decode(len(positions) - 1, torch.float32) - last).abs() <= half * 1.001 + 1e-6).all()
    open_loop = positions[0].clone()
    for before, after in itertools.pairwise(positions):
        open_loop += Quantized(bits=4, scale="channel").encode(after - before).decode()
    assert (open_loop - last).norm() > 2 * (chain.decode(12, torch.float32) - last).norm()


def test_both_directions_find_the_same_values():
    chain, positions = walk(BYTE)
    down = [chain.decode(i, torch.float32) for i in reversed(range(len(positions)))][::-1]
    up = [chain.decode(i, torch.float32) for i in range(len(positions))]
    for a, b, x in zip(down, up, positions, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert relative(a, x) < 0.01
    assert relative(down[0], positions[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_sum_is_kept_wide(dtype):
    chain, positions = walk(Exact(), dtype=dtype)
    assert chain.state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(chain.decode(5, dtype), positions[5]) <= torch.finfo(dtype).eps


# -- models -------------------------------------------------------------------------------------------------------


def test_growth_costs_digits_of_the_beginning():
    """No coding error here: what is left of x after x + 10,000 y is taken apart again, in fp32."""
    x, y = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    chain = Chain(state=x.clone())
    chain.push(x + 1e4 * y, Exact().encode)
    assert 1e-5 < relative(chain.decode(0, x.dtype), x) < 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exact_steps_give_exact_gradients(family):
    model, batch = tiny.build(family, dtype=torch.float64)
    exact = plain(model, batch)
    with loract.attach(model, streamed(Exact())):
        assert tiny.error(plain(model, batch), exact) < 1e-6  # PEFT's adapters stay in fp32


@pytest.mark.parametrize("name", ["balanced", "smallest"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_presets(family, name):
    """Values bit for bit, gradients within what the bits give, fewer bytes than exact sublayers."""
    model, batch = tiny.build(family, length=64)
    exact = plain(model, batch)
    value = tiny.run(model, batch, backward=False).detach()
    before, _ = saved_bytes(lambda: score(model, batch), model.parameters())
    with loract.attach(model, loract.preset("sublayer", codec=Exact())):
        inputs, _ = saved_bytes(lambda: score(model, batch), model.parameters())
    with loract.attach(model, name) as handle:
        assert torch.equal(tiny.run(model, batch, backward=False), value)
        after, _ = saved_bytes(lambda: score(model, batch), model.parameters())
        found = tiny.error(plain(model, batch), exact)
        assert any(s.kind == "stream" and s.coded for s in handle.stats())
    assert after < inputs < before
    assert 0 < found < {"balanced": 0.06, "smallest": 0.3}[name]


def test_kinds_in_bf16():
    model, batch = tiny.build("gemma3", dtype=torch.bfloat16)
    exact = plain(model, batch)
    with loract.attach(model, "balanced"):
        assert tiny.error(plain(model, batch), exact) < 0.05


def test_a_sandwich_norm_keeps_its_statistics_alone():
    model, batch = tiny.build("gemma3", length=64)
    with loract.attach(model, "balanced") as handle:
        score(model, batch)
        kept = bytes_by_name(handle)
    tokens = batch["input_ids"].numel()
    for name, size in kept.items():
        if "post_" in name:
            assert size == 4 * tokens  # rstd in fp32
        elif name.startswith("layers.1.") and "_norm" not in name:
            # rstd, codes, one scale a channel, and the tokens kept as they are with their numbers
            assert size == 4 * tokens + tokens * 64 * 7 // 8 + 4 * 64 + 16 * (64 * 4 + INDEX)


def test_channels_that_a_sandwich_norm_switches_off():
    model, batch = tiny.build("gemma3")
    for name, parameter in model.named_parameters():
        if "post_" in name and "layernorm" in name:
            parameter.data[::3] = -1  # 1 + w = 0
    exact = plain(model, batch)
    with loract.attach(model, "balanced"):
        assert tiny.error(plain(model, batch), exact) < 0.03


def test_a_norm_after_the_sum_is_coded_by_itself():
    """BERT has no stream: every input but the last is coded, and no sum is kept."""

    def chains():
        return {id(o) for o in gc.get_objects() if type(o) is Chain}

    model, batch = tiny.build("bert")
    before = chains()
    with loract.attach(model, "balanced") as handle:
        loss = score(model, batch)
        sizes = [s.bytes_after for s in handle.stats() if s.kind == "stream"][1:]
        assert chains() <= before
        del loss
    tokens = batch["input_ids"].numel()
    coded = 4 * tokens + tokens * 64 * 7 // 8 + 4 * 64 + 16 * (64 * 4 + INDEX)
    assert sizes[:-1] == [coded] * (len(sizes) - 1)


def test_parallel_branches_share_a_position():
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=97,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
    )
    model = peft.get_peft_model(
        transformers.GPTNeoXModel(config).train(),
        peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    batch = {"input_ids": torch.randint(3, 97, (2, 32))}
    exact = plain(model, batch)
    with loract.attach(model, "balanced") as handle:
        assert tiny.error(plain(model, batch), exact) < 0.02
        second = [s.bytes_after for s in handle.stats() if s.name.endswith("layers.1.post_attention_layernorm")]
    assert second == [4 * 64]  # its statistics: the codes are those of the norm beside it


def test_a_model_whose_every_parameter_trains():
    model, batch = tiny.build("llama")
    model.requires_grad_(True)
    exact = plain(model, batch)
    with loract.attach(model, streamed(Exact())):
        assert tiny.error(plain(model, batch), exact) < 1e-5
    with loract.attach(model, "balanced"):
        assert tiny.error(plain(model, batch), exact) < 0.02


def test_padding_and_accumulation():
    model, batch = tiny.build("gemma3", length=48)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :20] = 0
    batches = [{**batch, "attention_mask": mask}, batch]
    model.zero_grad()
    for b in batches:
        score(model, b).backward()
    exact = tiny.grads(model)
    with loract.attach(model, streamed(Exact())):
        model.zero_grad()
        for b in batches:
            score(model, b).backward()
        assert tiny.error(tiny.grads(model), exact) < 1e-5


def test_dropout_is_replayed():
    model, batch = tiny.build("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3

    def step():
        torch.manual_seed(3)
        return plain(model, batch)

    exact = step()
    with loract.attach(model, streamed(Exact())):
        assert tiny.error(step(), exact) < 1e-5


# -- lifetimes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_nothing_is_left_after_backward_though_the_loss_lives(family):
    model, batch = tiny.build(family)
    with loract.attach(model, "balanced"):
        score(model, batch).backward()
        model.zero_grad(set_to_none=False)

        def step():
            loss = score(model, batch)
            loss.backward()
            return loss

        gc.collect()
        left, loss = saved_bytes(step, model.parameters())
    sandwiches = 4 * (family == "gemma3")
    assert left <= 4 * batch["input_ids"].numel() * sandwiches + 600  # their rstd, and the loss
    assert loss.requires_grad


def test_a_retained_graph_is_walked_again():
    model, batch = tiny.build("gemma3")
    with loract.attach(model, "balanced"):
        model.zero_grad()
        loss = score(model, batch)
        loss.backward(retain_graph=True)
        first = tiny.grads(model)
        model.zero_grad()
        loss.backward(retain_graph=True)
        second = tiny.grads(model)
        model.zero_grad()
        loss.backward()
        third = tiny.grads(model)
        with pytest.raises(RuntimeError, match=r"second time|dropped"):
            loss.backward()
    assert tiny.error(second, first) < 1e-5
    assert tiny.error(third, first) < 1e-5


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_graphs_at_once(order):
    model, batch = tiny.build("llama")
    other = {**batch, "input_ids": batch["input_ids"].flip(1)}
    with loract.attach(model, "balanced"):
        expected = [plain(model, b) for b in (batch, other)]
        losses = [score(model, b) for b in (batch, other)]
        for index in order:
            model.zero_grad()
            losses[index].backward()
            assert tiny.error(tiny.grads(model), expected[index]) < 1e-5


def test_part_of_the_graph():
    """A gradient that needs only the upper layers, then all of it."""
    model, batch = tiny.build("llama")
    with loract.attach(model, "balanced"):
        expected = plain(model, batch)
        upper = {n: p for n, p in model.named_parameters() if "layers.1.mlp" in n and p.requires_grad}
        loss = score(model, batch)
        found = torch.autograd.grad(loss, list(upper.values()), retain_graph=True)
        model.zero_grad()
        loss.backward()
        assert tiny.error(tiny.grads(model), expected) < 1e-5
    assert tiny.error(dict(zip(upper, found, strict=True)), {n: expected[n] for n in upper}) < 1e-5


def test_tensors_moved_by_hooks():
    model, batch = tiny.build("gemma3")
    with loract.attach(model, "balanced"):
        expected = plain(model, batch)
        model.zero_grad()
        with torch.autograd.graph.save_on_cpu():
            loss = score(model, batch)
        loss.backward()
        assert tiny.error(tiny.grads(model), expected) < 1e-5


def test_an_input_edited_in_place_is_refused():
    class Edits(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            h = self.linear(x)
            y = self.first(h)
            h.mul_(2)
            return self.second(h + y)

    model = Edits()
    with (
        loract.attach(model, streamed(BYTE)),
        pytest.raises(loract.LoractError, match="edited in place"),
    ):
        model(torch.randn(4, 8)).sum().backward()


def test_no_growth():
    model, batch = tiny.build("gemma3")
    sizes = []
    with loract.attach(model, "balanced"):
        for _ in range(4):
            size, loss = saved_bytes(lambda: score(model, batch), model.parameters())
            loss.backward()
            sizes.append(size)
    assert len(set(sizes)) == 1


# -- second runs with merged weights ------------------------------------------------------------------------------


def layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20, bias=True)).to(dtype)
    config = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, **options)
    model = peft.get_peft_model(base, config)
    found = model.base_model.model[0]
    for parameter in (*found.lora_A.parameters(), *found.lora_B.parameters()):
        parameter.data = parameter.data.to(torch.float32 if dtype == torch.bfloat16 else dtype)
    return found


def test_merged_product_has_the_gradients_of_the_layer():
    module = layer()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 7, 20, dtype=torch.float64)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    expected = torch.autograd.grad(module(x), (x, a, b), upstream)
    adapter = single_adapter(module)
    merged = merge(module.base_layer.weight, adapter)
    out = adapted_linear(x, merged, module.base_layer.bias, adapter, x.dtype, read=True)
    assert torch.allclose(out, module(x))
    for ours, theirs in zip(torch.autograd.grad(out, (x, a, b), upstream), expected, strict=True):
        assert torch.allclose(ours, theirs)
    unread = adapted_linear(x, merged, module.base_layer.bias, adapter, x.dtype, read=False)
    assert unread.isnan().all()
    for ours, theirs in zip(torch.autograd.grad(unread, (x, a, b), upstream), expected, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addition_in_place_is_bit_equal(dtype):
    module = layer(dtype)
    x = torch.randn(3, 50, 12).to(dtype)
    with torch.no_grad():
        base = module.base_layer(x)
        assert torch.equal(in_place(base, x, module, single_adapter(module)), module(x))


def test_what_is_no_single_adapter():
    assert single_adapter(layer(lora_dropout=0.1).train()) is None
    assert single_adapter(layer(lora_dropout=0.1).eval()) is not None
    assert single_adapter(layer(use_dora=True)) is None
    disabled = layer()
    disabled.enable_adapters(False)
    assert single_adapter(disabled) is None
    merged = layer()
    merged.merge()
    assert single_adapter(merged) is None


def test_adapters_switched_while_attached():
    model, batch = tiny.build("llama")
    twin = copy.deepcopy(model)
    with loract.attach(model, "balanced"):
        plain(model, batch)
        with model.disable_adapter():
            value = tiny.run(model, batch, backward=False).detach()
    with twin.disable_adapter():
        assert torch.equal(tiny.run(twin, batch, backward=False).detach(), value)
