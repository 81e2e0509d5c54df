"""Codecs and small attached models under drawn shapes, layouts, values, edits and faults. Always the same draws."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import loract
from loract import Exact, LowRank, Policy, Quantized, Rule, Transform
from oracles import relative

FULL = LowRank(rank=1.0, guard=False)
STEP = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""Rounding alone, relative to the whole tensor."""
DTYPES = st.sampled_from(list(STEP))


def fuzz(examples):
    """So many draws, the same in every run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


# Tensors


@st.composite
def shapes(draw, features=None):
    leading = draw(st.lists(st.integers(0, 7), min_size=0, max_size=3))
    return (*leading, draw(st.integers(1, 33)) if features is None else features)


def contiguous(x):
    return x


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def strided(x):
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


def shifted(x):
    return x.new_zeros(x.numel() + 3)[3:].view(x.shape).copy_(x)


def expanded(x):
    return x[:1].expand(x.shape)


def sliding(x):
    """Rows that overlap in memory."""
    flat = x.flatten()
    return x if x.numel() < 2 * x.shape[-1] else flat.as_strided((flat.numel() - x.shape[-1] + 1, x.shape[-1]), (1, 1))


LAYOUTS = (contiguous, transposed, strided, shifted, expanded, sliding)


@st.composite
def tensors(draw, shape=None, dtype=DTYPES, bad=True, layouts=LAYOUTS, least=-6, most=4):
    """Gaussian values of some magnitude, perhaps with a NaN or an infinity, in some layout."""
    shape, dtype = draw(shapes() if shape is None else shape), draw(dtype)
    half = dtype in (torch.bfloat16, torch.float16)
    scale = 10.0 ** draw(st.integers(max(least, -2) if half else least, min(most, 2) if half else most))
    drawn = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = (torch.randn(shape, generator=drawn, dtype=torch.float64) * scale).to(dtype)
    if draw(st.booleans()) and x.numel():  # as after a ReLU
        x.clamp_(min=0)
    if bad and x.numel() and draw(st.integers(0, 3)) == 0:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    return draw(st.sampled_from(layouts))(x)


CODECS = (
    Exact(),
    LowRank(rank=0.25),
    LowRank(rank=3, guard=False),
    LowRank(rank=2, tolerance=0.1, factor_bits=8, guard=False),
    FULL,
    Quantized(bits=8),
    Quantized(bits=3, group=5, guard=False),
    Quantized(bits=1, guard=False),
    Quantized(bits=4, scale="row", guard=False),
    Quantized(bits=5, scale="channel", outliers=3, guard=False),
    Quantized(bits=4, scale="row", outliers=2, guard=False),
    Quantized(bits=4, scale="channel", grid="normal", guard=False),
    Quantized(bits=6, stochastic=True, guard=False),
    Transform(bits=2.0),
    Transform(bits=1.0, outliers=2, guard=False),
    Transform(bits=3.0, target_error=0.1, refresh=2, guard=False),
)


def near(ours, expected, dtype, size):
    """Equal but for rounding relative to `size`, and not finite where the other is not."""
    ours, expected = ours.double(), expected.double()
    assert ours.shape == expected.shape
    finite = expected.isfinite()
    assert not ours[~finite].isfinite().any()
    if finite.all():
        assert (ours - expected).norm() <= STEP[dtype] * size + 1e-30


def generator():
    return torch.Generator().manual_seed(0)


def fits(codec, features):
    """Whether it has columns to keep; with its guard up it keeps what is too narrow for its share as it is."""
    if isinstance(codec.rank, int):
        return codec.rank <= features
    return codec.guard or round(codec.rank * features) > 0


@fuzz(800)
@given(st.sampled_from(CODECS), tensors())
def test_codecs(codec, x):
    before, layout, state = x.clone(), (x.stride(), x.storage_offset(), x._version), torch.get_rng_state()
    features = x.shape[-1]
    tokens = x.numel() // features
    if tokens and isinstance(codec, LowRank) and not fits(codec, features):
        with pytest.raises(loract.InvalidSpec, match=f"{features} features"):
            codec.encode(x, generator())
        return
    packed = codec.encode(x, generator())
    decoded = packed.decode()
    assert torch.equal(torch.get_rng_state(), state)
    assert (x.stride(), x.storage_offset(), x._version) == layout
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    assert (packed.shape, packed.dtype, decoded.shape, decoded.dtype) == (
        *((tokens, features), x.dtype),
        *((tokens, features), x.dtype),
    )
    flat = before.reshape(tokens, features)
    assert not decoded[~flat.isfinite()].isfinite().any()
    if getattr(codec, "guard", True):
        assert packed.nbytes <= x.numel() * x.element_size()
    if packed.tensors[0] is x:
        assert torch.equal(decoded.nan_to_num(7.0), flat.nan_to_num(7.0))
        assert packed.error is None
    elif flat.isfinite().all():
        assert decoded.isfinite().all()
        if codec is FULL:
            near(decoded, flat, x.dtype, flat.double().norm())
    # Every way of reading says the same.
    g = torch.randn(tokens, 2, generator=generator()).to(x.dtype)
    w = torch.randn(3, features, generator=generator()).to(x.dtype)
    size = decoded.double().norm()
    if decoded.isfinite().all():
        near(packed.contract(g), g.double().T @ decoded.double(), x.dtype, size * g.double().norm())
        near(packed.linear(w), decoded.double() @ w.double().T, x.dtype, size * w.double().norm())
        bound = packed.bind([None] * len(packed.tensors)).bind([t.clone() for t in packed.tensors])
        assert torch.equal(bound.decode(), decoded)


@fuzz(150)
@given(
    tensors(dtype=st.sampled_from([torch.float64, torch.float32]), bad=False),
    st.sampled_from(["group", "row", "channel"]),
    st.integers(2, 8),
    st.integers(2, 9),
)
def test_quantised_values_are_within_half_a_step(x, scale, bits, group):
    flat = x.reshape(-1, x.shape[-1]).double()
    decoded = Quantized(bits=bits, scale=scale, group=group, guard=False).encode(x).decode().double()
    step = torch.zeros_like(flat)
    if flat.numel() and scale == "channel":
        step += flat.abs().amax(0, keepdim=True) / (2 ** (bits - 1) - 1)
    elif scale == "row":
        step += flat.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    else:
        for start in range(0, flat.shape[1], group):
            part = flat[:, start : start + group]
            step[:, start : start + group] = (part.amax(1) - part.amin(1))[:, None] / (2**bits - 1)
    assert ((decoded - flat).abs() <= 0.5001 * step + 1e-6 * flat.abs().amax(1, keepdim=True)).all()


@fuzz(60)
@given(st.data())
def test_a_state_survives_whatever_comes(data):
    """Shapes, layouts and values change from step to step; afterwards a good tensor is coded as well as ever."""
    codec = data.draw(st.sampled_from([c for c in CODECS if isinstance(c, (LowRank, Transform))]))
    state = loract.codecs.State()
    features = data.draw(st.integers(4, 20))
    for step in range(4):
        x = data.draw(tensors(shape=shapes(features), dtype=st.just(torch.float32)))
        decoded = codec.encode(x, torch.Generator().manual_seed(step), state).decode()
        assert not decoded[~x.reshape(-1, features).isfinite()].isfinite().any()
    low = torch.randn(40, 1, generator=generator()) @ torch.randn(1, features, generator=generator())
    for step in range(3):
        last = codec.encode(low, torch.Generator().manual_seed(step), state).decode()
    assert relative(last, low) <= (0.6 if isinstance(codec, Transform) else 0.05)


# Attached models


class Norm(nn.Module):
    """Root mean square, written out."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b) for a, b in [(width, 12), (width, 12), (12, width)])
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = Norm(width), nn.LayerNorm(width)
        self.mlp, self.tail = Gate(width), nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x):
        x = x + self.mlp(self.first(x))
        return x + self.tail(self.second(x))


class Stack(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.start, self.blocks, self.end = (
            nn.Linear(width, width),
            nn.ModuleList(Block(width) for _ in range(2)),
            nn.LayerNorm(width),
        )

    def forward(self, x):
        return self.end(functools.reduce(lambda x, block: block(x), self.blocks, self.start(x)))


def streamed(codec):
    return Policy(name="streamed", rules=(Rule(kind="stream", codec=codec), *loract.preset("exact").rules))


POLICIES = {
    "exact": loract.preset("exact"),
    "full rank": loract.preset("tensor", codec=FULL),
    "sublayer": loract.preset("sublayer", codec=Exact()),
    "layer": loract.preset("layer", codec=Exact()),
    "full rank layer": loract.preset("layer", codec=FULL),
    "stream": streamed(Exact()),
    "balanced": loract.preset("balanced"),
    "tensor": loract.preset("tensor", codec=Transform(bits=2.0, guard=False)),
}
LOSSLESS = ("exact", "sublayer", "layer", "stream", "full rank", "full rank layer")


@functools.cache
def stack(dtype):
    return Stack().to(dtype).train()


def passed(model, x):
    """Output and gradients by name, the input's among them; a gradient that depends on the output's every element."""
    model.zero_grad()
    leaf = x.detach().requires_grad_(x.requires_grad)
    out = model(leaf)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), found | ({} if leaf.grad is None else {"input": leaf.grad})


def same_gradients(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    a, b = (torch.cat([found[name].double().flatten() for name in expected]) for found in (ours, expected))
    if b.isfinite().all() and tolerance is not None:
        assert (a - b).norm() <= tolerance * b.norm() + 1e-12
    for name, gradient in expected.items():
        hidden = ~gradient.isfinite() & ours[name].isfinite()
        assert not hidden.any(), name


@fuzz(120)
@given(
    st.sampled_from(list(POLICIES)),
    tensors(shape=shapes(8), least=-1, most=1),
    st.booleans(),
)
@example("balanced", torch.empty(0, 8), True)
@example("balanced", torch.ones(8), True)
@example("layer", torch.empty(2, 0, 8), False)
def test_attached_models(name, x, leaf):
    model = stack(x.dtype)
    x = x.detach()  # a layout of its own is kept
    x.requires_grad_(leaf)
    reference, expected = passed(model, x)
    with loract.attach(model, POLICIES[name]):
        for _ in range(2):  # the call that is tried, and the next
            ours, found = passed(model, x)
            assert torch.equal(ours.nan_to_num(7.0), reference.nan_to_num(7.0))
            tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(x.dtype, 0.1)
            # What is coded in a few bits is only ever judged by what must not be hidden.
            same_gradients(found, expected, tolerance if name in LOSSLESS else None)
    assert not any("forward" in vars(module) for module in model.modules())


# Edits in place

EDITS = {  # in place, and the same out of place
    "add_": (lambda t: t.add_(0.5), lambda t: t + 0.5),
    "mul_": (lambda t: t.mul_(2.0), lambda t: t * 2.0),
    "of a view": (
        lambda t: (t.view(-1)[::3].mul_(0.5), t)[1],
        lambda t: torch.where((torch.arange(t.numel()) % 3 == 0).view(t.shape), t * 0.5, t),
    ),
    "of rows": (lambda t: (t[:1].zero_(), t)[1], lambda t: torch.cat([torch.zeros_like(t[:1]), t[1:]])),
    "copy_": (lambda t: t.copy_(t.flip(0)), lambda t: t.flip(0)),
    "detached": (lambda t: (t.detach().mul_(3.0), t)[1], None),
    "exp_": (lambda t: t.exp_(), lambda t: t.exp()),
}
PLACES = ("input", "norm's input", "norm's output", "between readers", "gate", "active", "product")


class Edited(nn.Module):
    """A sublayer in which a tensor changes at one place, after those before have read it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.start, self.norm, self.end = nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.first, self.second, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.SiLU()
        self.place, self.edit = "", None

    def at(self, place, x):
        return self.edit(x) if place == self.place else x

    def forward(self, x):
        h = self.start(x)
        h = self.at("input", h)
        y = self.norm(h)
        h = self.at("norm's input", h)
        y = self.at("norm's output", y)
        gate = self.first(y)
        y = self.at("between readers", y)
        up = self.second(y)
        active = self.act(gate)
        gate = self.at("gate", gate)
        product = self.at("active", active) * up
        out = self.down(product)
        self.at("product", product)
        return self.end(h + out + gate.mean())


def adapted(model):
    peft = pytest.importorskip("peft")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).train()


@functools.cache
def edited(adapters):
    return adapted(Edited()) if adapters else Edited()


def of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@fuzz(120)
@given(
    st.sampled_from(["exact", "full rank", "stream", "sublayer"]),
    st.sampled_from(PLACES),
    st.sampled_from(list(EDITS)),
    st.booleans(),
)
def test_an_edit_in_place_is_noticed(name, place, edit, adapters):
    """The gradient is that of the same change out of place, or it is refused; where autograd takes it, so do we."""
    model, x = edited(adapters), torch.randn(5, 8, generator=generator())
    inner = of(model)
    in_place, out_of_place = EDITS[edit]
    inner.place = place
    try:
        inner.edit = out_of_place
        expected = None if out_of_place is None else passed(model, x)
        inner.edit = in_place
        plain = unless_refused(lambda: passed(model, x))
        inner.edit = lambda t: t
        with loract.attach(model, POLICIES[name]):
            inner.edit = in_place
            ours = unless_refused(lambda: passed(model, x))
    finally:
        inner.place, inner.edit = "", None
    if ours is None:
        assert name == "stream" or plain is None
        return
    if plain is not None:
        assert torch.equal(ours[0], plain[0])
    if (expected := expected or plain) is not None:
        same_gradients(ours[1], expected[1], 1e-3)


def unless_refused(step):
    """What a step gives; None where it says that something was edited in place."""
    try:
        return step()
    except (RuntimeError, loract.LoractError) as error:
        if "inplace" in str(error) or "edited in place" in str(error):
            return None
        raise


# Exceptions


class Fault(Exception):
    pass


RAISED = (Fault, KeyError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)


class Fuse(nn.Module):
    """Passes on what it gets, and raises at one of its calls, in forward or in its gradient."""

    def __init__(self):
        super().__init__()
        self.error, self.calls, self.at, self.backward = None, 0, 0, False

    def forward(self, x):
        self.burn(not self.backward)
        if x.requires_grad and self.error is not None and self.backward:
            x = x * 1
            x.register_hook(lambda _: self.burn(True))
        return x

    def light(self, error, at, backward):
        self.error, self.calls, self.at, self.backward = error, 0, at, backward

    def burn(self, here):
        if self.error is None or not here:
            return
        self.calls += 1
        if self.calls == self.at:
            raise self.error("burnt")


def state_of(model):
    """All attributes and parameters of all modules, by identity; not what lights a fuse."""
    modules = dict(model.named_modules())
    own = {(name, key): id(value) for name, m in modules.items() for key, value in vars(m).items()}
    own |= {(name, key): id(value) for name, m in modules.items() for key, value in m._parameters.items()}
    return {key: value for key, value in own.items() if key[1] not in ("error", "calls", "at", "backward")}


@functools.cache
def fused():
    model = Stack()
    for block in model.blocks:
        block.mlp.down = nn.Sequential(Fuse(), block.mlp.down)
        block.tail.insert(1, Fuse())
    fuses = [m for m in model.modules() if isinstance(m, Fuse)]
    return model.train(), fuses


def deterministic(name):
    """Policies whose second step draws as the first did."""
    return loract.preset("tensor", codec=Quantized(bits=8, guard=False)) if name == "tensor" else POLICIES[name]


@fuzz(100)
@given(
    st.sampled_from(["exact", "tensor", "sublayer", "layer", "full rank layer", "stream", "balanced"]),
    st.sampled_from(RAISED),
    st.integers(0, 3),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_an_exception_anywhere_leaves_nothing_behind(name, raised, where, at, backward, first):
    """In forward, in a second run or in a gradient; in the step that learns about modules or in a later one."""
    (model, fuses), x = fused(), torch.randn(3, 4, 8, generator=generator())
    x.requires_grad_()
    before = state_of(model)
    policy = deterministic(name)
    with loract.attach(model, policy):
        expected = passed(model, x)
    assert state_of(model) == before
    fuse = fuses[where]
    draws = torch.get_rng_state()
    with loract.attach(model, policy) as handle:
        attached = state_of(model)
        if not first:
            passed(model, x)
        fuse.light(raised, at, backward)
        hit = False
        try:
            passed(model, x)
        except raised:
            hit = True
        finally:
            fuse.error = None
        # A trial of fewer tokens takes an exception for the answer that the module needs all of them.
        assert hit or fuse.calls < at or (first and raised in (Fault, KeyError))
        assert state_of(model) == attached
        assert not handle.ledger.recomputing
        assert torch.equal(torch.get_rng_state(), draws)
        ours = passed(model, x)
        assert torch.equal(ours[0], expected[0])
        same_gradients(ours[1], expected[1], 1e-4 if name.startswith("full rank") else 1e-6)
    assert state_of(model) == before


def test_an_exception_leaves_the_context_and_the_model_is_as_before():
    (model, fuses), x = fused(), torch.randn(4, 8, generator=generator())
    before = state_of(model)
    reference = passed(model, x)
    for backward in (False, True):
        handle = loract.attach(model, "balanced")
        fuses[1].light(Fault, 1, backward)
        with pytest.raises(Fault), handle:
            passed(model, x)
        fuses[1].error = None
        assert state_of(model) == before
        ours = passed(model, x)
        assert torch.equal(ours[0], reference[0])
        assert all(torch.equal(ours[1][key], value) for key, value in reference[1].items())


# Codecs that run out of memory


class Short:
    """A codec that runs out of memory at one of its calls."""

    def __init__(self, inner, error, at):
        self.inner, self.error, self.at, self.calls = inner, error, at, 0

    def codes(self, *args):
        return self.inner.codes(*args)

    def encode(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise self.error("no memory")
        return self.inner.encode(*args)


BYTE = Quantized(bits=8, guard=False)


@fuzz(100)
@given(
    st.sampled_from(["norm", "gated", "stream", "sublayer", "layer", "inside"]),
    st.sampled_from([MemoryError, torch.OutOfMemoryError]),
    st.integers(1, 6),
)
def test_a_codec_that_runs_out_of_memory_fails_the_step_alone(kind, error, at):
    model, x = stack(torch.float32), torch.randn(4, 8, generator=generator())
    before = state_of(model)

    def policy(codec):
        if kind == "inside":  # while a block runs again
            once = (Rule(kind=each, codec=Exact()) for each in ("layer", "norm"))
            return Policy(name="short", rules=(*once, Rule(kind="norm", codec=codec, recomputed=True)))
        others = loract.preset("sublayer" if kind == "stream" else "exact", codec=None if kind != "stream" else Exact())
        return Policy(name="short", rules=(Rule(kind=kind, codec=codec), *others.rules))

    with loract.attach(model, policy(BYTE)):
        expected = passed(model, x)
    model.zero_grad()
    with loract.attach(model, policy(BYTE)) as handle:
        sites = [site for site in handle.sites if site.codec is BYTE or site.again is BYTE]
        assert sites
        short = Short(BYTE, error, at)
        for site in sites:
            if site.codec is BYTE:
                site.codec = short
            if site.again is BYTE:
                site.again = short
        failed = False
        try:
            passed(model, x)
        except error:
            failed = True
        assert failed == (short.calls >= at)
        short.at = 0
        ours = passed(model, x)
        assert torch.equal(ours[0], expected[0])
        same_gradients(ours[1], expected[1], 1e-6)
    assert state_of(model) == before
