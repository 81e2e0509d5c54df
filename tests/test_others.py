"""The saved-tensor tier: what it codes, and what it never touches."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

import loract
import tiny
from loract import Exact, LowRank, Policy, Quantized, Rule, Transform
from loract.memory import saved_bytes
from loract.others import NARROWEST, SMALLEST
from oracles import relative

TOKENS, WIDTH = 256, 64


class Block(nn.Module):
    """A block of operators that no function of the library stands behind."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm(x)
        scores = y @ y.mT / WIDTH
        y = scores.softmax(-1) @ torch.sin(self.mix(y))
        return x + self.out(y * torch.cos(y))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def policy(codec):
    return Policy(name="mine", rules=(Rule(kind="norm", codec=Exact()), Rule(kind="other", codec=codec)))


def inputs():
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def step(model):
    model.zero_grad()
    out = model(inputs())
    (tiny.weights(out) * out).sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def others(handle):
    return [s for s in handle.stats() if s.kind == "other"]


@pytest.mark.parametrize(
    ("codec", "tolerance"),
    [
        (LowRank(rank=1.0, guard=False), 1e-5),
        (Exact(), 1e-6),
        (Quantized(bits=8), 0.01),
        (Quantized(bits=4), 0.2),
        (Transform(bits=6), 0.2),
        (LowRank(tolerance=0.05), 0.3),
    ],
    ids=str,
)
def test_gradients_follow_the_codec_and_values_stay(codec, tolerance):
    model = Stack()
    plain, exact = step(model)
    with loract.attach(model, policy(codec)) as handle:
        for _ in range(2):
            out, ours = step(model)
        found = others(handle)
    assert [s.name for s in found] == ["layers.0", "layers.1"]
    assert all(s.coded is not isinstance(codec, Exact) for s in found)
    assert torch.equal(out, plain)
    assert relative(ours, exact) < tolerance


def test_bytes_of_eight_bits():
    model = Stack()
    plain = saved_bytes(lambda: model(inputs()), list(model.parameters()))[0]
    with loract.attach(model, policy(Exact())):
        exact = saved_bytes(lambda: model(inputs()), list(model.parameters()))[0]
    with loract.attach(model, policy(Quantized(bits=8))) as handle:
        coded = saved_bytes(lambda: model(inputs()), list(model.parameters()))[0]
        found = others(handle)
    softmax = 2 * TOKENS * TOKENS * 4
    before, after = (sum(getattr(s, name) for s in found) for name in ("bytes_before", "bytes_after"))
    assert before > 2 * 5 * TOKENS * WIDTH * 4  # y, mix's output, sin, y again, the product, out's input
    assert exact - coded == before - after
    assert coded < softmax + 0.3 * (plain - softmax) + 2 * TOKENS * WIDTH * 4  # each norm's input is kept


def tensors_coded(forward, *inputs):
    """Whether what an operator saves is coded, in order: by the hook that is active inside a block."""
    from loract.others import others_coded
    from loract.saved import Index, Ledger, RunningSite

    site = RunningSite(
        site=loract.Site(kind="other", name="x"), codec=Quantized(bits=8), seed=0, index=Index(), ledger=Ledger()
    )
    encoded = []
    encode = site.encode
    site.encode = lambda x: encoded.append(tuple(x.shape)) or encode(x)
    with others_coded(site):
        out = forward(*inputs)
    return out, encoded


def big(*shape, grad=True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_() * 1.0 * torch.ones(shape[-1], requires_grad=True) if grad else x


WIDE = (SMALLEST // NARROWEST, 4, NARROWEST)


@pytest.mark.parametrize(
    ("forward", "operands"),
    [
        (lambda x: x.softmax(-1), [big(TOKENS, WIDTH)]),
        (lambda x: x.log_softmax(-1), [big(TOKENS, WIDTH)]),
        (lambda x, y: x.softmax(-1) @ y, [big(TOKENS, 2 * WIDTH), big(2 * WIDTH, 16)]),
        (lambda x: functional.linear(x, nn.Linear(512, 512).weight), [big(8, 512)]),
        (lambda x: x @ nn.Linear(512, 512).weight.T.double().float(), [big(8, 512)]),
        (lambda x, mask: x * mask, [big(4, NARROWEST), big(*WIDE, grad=False) > 0]),
        (lambda x, angles: x * angles, [big(4, NARROWEST), big(*WIDE, grad=False)]),
        (lambda x, index: functional.embedding(index, x), [big(4, NARROWEST), torch.zeros(SMALLEST, dtype=torch.long)]),
        (lambda x: x.tanh(), [big(4, NARROWEST)]),
        (lambda x: x.tanh(), [big(SMALLEST, NARROWEST // 2)]),
    ],
    ids=["softmax", "log", "probabilities", "weight", "cast", "mask", "angles", "integers", "small", "narrow"],
)
def test_what_is_never_touched(forward, operands):
    out, encoded = tensors_coded(forward, *operands)
    assert encoded == []
    assert out.requires_grad


def test_a_tensor_that_several_operators_save_is_coded_once():
    def forward(x):
        x = x.tanh()
        return x.sin() + x.cos() + x.view(2, -1, WIDTH).square().flatten(0, 1)

    out, encoded = tensors_coded(forward, big(TOKENS, WIDTH))
    assert encoded == [(TOKENS, WIDTH)]
    out.sum().backward()


def test_it_works_inside_the_users_own_hooks():
    model, packs = Stack(), []
    _, exact = step(model)
    with (
        loract.attach(model, policy(Quantized(bits=8))),
        saved_tensors_hooks(lambda t: packs.append(t) or t, lambda t: t),
    ):
        _, ours = step(model)
    assert packs
    assert relative(ours, exact) < 0.01


def test_inside_a_region_it_rests():
    model = Stack()
    _, exact = step(model)
    rules = (Rule(kind="layer", codec=Exact()), Rule(kind="other", codec=Quantized(bits=2)))
    with loract.attach(model, Policy(name="mine", rules=rules)) as handle:
        _, ours = step(model)
        assert not any(s.bytes_after for s in others(handle))
    assert relative(ours, exact) < 1e-5


def test_whole_models_in_full_fine_tuning():
    """Plain linear layers keep their inputs themselves: no other tier sees them."""
    model, batch = tiny.build("llama", length=128)
    model = model.unload()
    for parameter in model.parameters():
        parameter.requires_grad_()
    rules = tuple(Rule(kind=kind, codec=Exact()) for kind in ("norm", "gated", "attention"))
    plain = tiny.run(model, batch)
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    sizes = {}
    for name, extra in (("without", ()), ("with", (Rule(kind="other", codec=Quantized(bits=8)),))):
        model.zero_grad()
        with loract.attach(model, Policy(name=name, rules=(*rules, *extra))):
            sizes[name] = saved_bytes(lambda: tiny.run(model, batch, backward=False), list(model.parameters()))[0]
            out = tiny.run(model, batch)
        ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(out, plain)
    assert sizes["with"] < 0.8 * sizes["without"]
    assert relative(ours, exact) < 0.02
