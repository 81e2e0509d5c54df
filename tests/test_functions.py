"""Autograd Functions against plain autograd: equal at full rank, bit-equal forward, nothing kept but what is packed."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional

import oracles
from loract.codecs import Exact, LowRank, Quantized
from loract.functions.adapter import adapter_product
from loract.functions.gated import GatedCall, gated
from loract.functions.norm import NormCall, NormRole, metric, norm
from loract.memory import saved_bytes
from loract.rangefinder import Gaussian, Sampled, Truncated

FULL = {
    "exact": Exact(),
    "sampled": LowRank(rank=1.0, guard=False),
    "tokens": LowRank(rank=1.0, guard=False, sampler=Sampled(sample="tokens", weights="uniform")),
    "gaussian": LowRank(rank=1.0, guard=False, sampler=Gaussian()),
    "truncated": LowRank(rank=1.0, guard=False, sampler=Truncated()),
}
full = pytest.mark.parametrize("codec", FULL.values(), ids=FULL)
ROLES = {
    "rms": NormRole(centred=False, offset=0.0, eps=1e-6, weight="weight", bias=None),
    "rms-offset": NormRole(centred=False, offset=1.0, eps=1e-6, weight="weight", bias=None),
    "rms-large-eps": NormRole(centred=False, offset=0.0, eps=0.5, weight="weight", bias=None),
    "rms-plain": NormRole(centred=False, offset=0.0, eps=1e-6, weight=None, bias=None),
    "layer": NormRole(centred=True, offset=0.0, eps=1e-5, weight="weight", bias="bias"),
    "layer-no-bias": NormRole(centred=True, offset=0.0, eps=1e-5, weight="weight", bias=None),
    "layer-large-eps": NormRole(centred=True, offset=0.0, eps=0.5, weight="weight", bias="bias"),
    "layer-plain": NormRole(centred=True, offset=0.0, eps=1e-5, weight=None, bias=None),
}
every_role = pytest.mark.parametrize("role", ROLES.values(), ids=ROLES)
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "tanh-gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def normal(*shape, seed=0, dtype=torch.float64, grad=True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(grad)


def encode(codec, x):
    return codec.encode(x.detach(), torch.Generator().manual_seed(0))


def gradients(output, inputs, seed=7):
    upstream = normal(*output.shape, seed=seed, dtype=output.dtype, grad=False)
    return torch.autograd.grad(output, inputs, upstream)


def equal(ours, expected, tolerance=1e-12):
    assert len(ours) == len(expected)
    for actual, wanted in zip(ours, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert oracles.relative(actual, wanted) <= tolerance


def product(x, weight, codec):
    return adapter_product(x, weight, encode(codec, x), lambda t: t @ weight.T)


def parameters(role, features, dtype=torch.float64, zeros=True):
    """Weight and bias, where the role has them; some channels have the factor offset + weight = 0."""
    weight = normal(features, seed=3, dtype=dtype) if role.weight else None
    if weight is not None and zeros:
        with torch.no_grad():
            weight[::3] = -role.offset
    return weight, normal(features, seed=4, dtype=dtype) if role.bias else None


def reference(role, x, weight, bias):
    scale = None if weight is None else weight + role.offset
    return oracles.full_norm(x, scale, bias, role.eps, role.centred)


def normed(role, codec, x, weight, bias):
    """The library's norm, and the call that tells what stands for its output."""
    call = NormCall(
        role=role,
        forward=lambda t: reference(role, t, weight, bias),
        lossy=not isinstance(codec, Exact),
        encode=lambda t: encode(codec, t),
    )
    return norm(x, weight, bias, call), call


def multiplied(gate, up, codec, activation=functional.silu):
    operands = encode(codec, gate), None if up is None else encode(codec, up)
    call = GatedCall(activation=activation, gate=operands[0], up=operands[1])
    return gated(gate, up, call), call


def present(*tensors):
    return [t for t in tensors if t is not None]


# The adapter's product


@full
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (2, 2, 3, 6), (1, 6)])
def test_adapter_product_equals_autograd(codec, shape):
    x, weight = normal(*shape), normal(3, 6, seed=1)
    ours, plain = product(x, weight, codec), x @ weight.T
    assert torch.equal(ours, plain)
    equal(gradients(ours, (x, weight)), gradients(plain, (x, weight)))


@full
def test_adapter_product_gradcheck(codec):
    def function(x, weight):
        return product(x, weight, codec)

    assert torch.autograd.gradcheck(function, (normal(5, 4), normal(2, 4, seed=1)))


def test_adapter_product_at_a_low_rank_projects_the_weights_gradient_only():
    x, weight = normal(40, 16), normal(3, 16, seed=1)
    packed = encode(LowRank(rank=4), x)
    ours = gradients(adapter_product(x, weight, packed, lambda t: t @ weight.T), (x, weight))
    g = normal(40, 3, seed=7, grad=False)
    equal(ours, (g @ weight.detach(), g.T @ packed.decode()))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_adapter_product_with_one_frozen_operand(frozen):
    x, weight = normal(7, 6, grad=frozen != "x"), normal(3, 6, seed=1, grad=frozen != "weight")
    wanted = weight if frozen == "x" else x
    equal(gradients(product(x, weight, Exact()), [wanted]), gradients(x @ weight.T, [wanted]))


def test_adapter_product_reads_what_x_was_cast_from():
    source = normal(40, 6, dtype=torch.bfloat16, grad=False)
    weight = normal(3, 6, seed=1, dtype=torch.float32)
    ours = adapter_product(source.float(), weight, encode(Exact(), source), lambda t: t @ weight.T)
    equal(gradients(ours, [weight]), gradients(source.float() @ weight.T, [weight]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_product_under_autocast(dtype):
    x, weight = normal(40, 16, dtype=torch.float32), normal(3, 16, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        ours = adapter_product(x, weight, encode(Exact(), x), lambda t: functional.linear(t, weight))
        plain = functional.linear(x, weight)
    assert ours.dtype == dtype
    assert torch.equal(ours, plain)
    equal(gradients(ours, (x, weight)), gradients(plain, (x, weight)), 2e-2)


# Norms


@full
@every_role
@pytest.mark.parametrize("shape", [(9, 6), (2, 3, 6), (1, 6)])
def test_norm_equals_autograd(role, codec, shape):
    x, (weight, bias) = normal(*shape), parameters(role, 6)
    inputs = present(x, weight, bias)
    ours, _ = normed(role, codec, x, weight, bias)
    plain = reference(role, x, weight, bias)
    assert torch.equal(ours, plain)
    equal(gradients(ours, inputs), gradients(plain, inputs), 1e-11)


@full
@every_role
def test_norm_gradcheck(role, codec):
    weight, bias = parameters(role, 4)

    def function(x, *rest):
        given = iter(rest)
        return normed(role, codec, x, next(given) if role.weight else None, next(given) if role.bias else None)[0]

    assert torch.autograd.gradcheck(function, tuple(present(normal(5, 4), weight, bias)))


@full
@every_role
def test_a_norms_output_is_read_from_the_same_tensors(role, codec):
    x, (weight, bias) = normal(9, 6), parameters(role, 6)
    y, call = normed(role, codec, x, weight, bias)
    y, g, w = y.detach(), normal(9, 2, seed=5, grad=False), normal(3, 6, seed=6, grad=False)
    assert call.output.shape == (9, 6)
    equal([call.output.decode(), call.output.contract(g), call.output.linear(w)], [y, g.T @ y, y @ w.T])


@every_role
def test_a_norm_agrees_with_torchs_own(role):
    x, (weight, bias) = normal(9, 6), parameters(role, 6)
    scale = None if weight is None else weight + role.offset
    if role.centred:
        theirs = functional.layer_norm(x, (6,), scale, bias, role.eps)
    else:
        theirs = functional.rms_norm(x, (6,), scale, role.eps)
    inputs = present(x, weight, bias)
    equal(gradients(normed(role, Exact(), x, weight, bias)[0], inputs), gradients(theirs, inputs), 1e-11)


@pytest.mark.parametrize("codec", [Exact(), FULL["sampled"]], ids=["exact", "sampled"])
@pytest.mark.parametrize("name", ["rms-offset", "layer"])
def test_a_norm_over_several_chunks_of_rows(name, codec):
    role = ROLES[name]
    x, (weight, bias) = normal(2051, 4), parameters(role, 4)
    inputs = present(x, weight, bias)
    ours = gradients(normed(role, codec, x, weight, bias)[0], inputs)
    equal(ours, gradients(reference(role, x, weight, bias), inputs), 1e-11)


@every_role
@pytest.mark.parametrize("codec", [Exact(), LowRank(rank=0.25), Quantized(bits=8, group=16)], ids=["x", "k", "8"])
def test_zero_weights_give_finite_gradients(role, codec):
    x = normal(64, 32, dtype=torch.float32)
    weight, bias = parameters(role, 32, dtype=torch.float32)
    if weight is not None:
        with torch.no_grad():
            weight.fill_(-role.offset)
    inputs = present(x, weight, bias)
    ours, call = normed(role, codec, x, weight, bias)
    assert all(torch.isfinite(g).all() for g in gradients(ours, inputs))
    assert torch.isfinite(call.output.decode()).all()


def test_the_metric_lies_between_one_and_the_weight_and_is_never_zero():
    scale = torch.tensor([0.0, -4.0, 0.5, 1.0, 9.0])
    assert metric(scale).tolist() == [0.5, 2.5, 0.75, 1.0, 5.0]
    assert metric(None) is None


@every_role
@pytest.mark.parametrize("codec", [Exact(), FULL["sampled"]], ids=["exact", "sampled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_16_bits_is_as_good_as_autograd(role, codec, dtype):
    wide_x, wide = normal(200, 32), parameters(role, 32)
    x, weight, bias = (None if t is None else t.detach().to(dtype).requires_grad_() for t in (wide_x, *wide))
    inputs, exact = present(x, weight, bias), present(wide_x, *wide)
    ours, _ = normed(role, codec, x, weight, bias)
    plain = reference(role, x, weight, bias)
    assert torch.equal(ours, plain)
    truth = gradients(reference(role, wide_x, *wide), exact)
    for actual, theirs, wanted in zip(gradients(ours, inputs), gradients(plain, inputs), truth, strict=True):
        assert actual.dtype == dtype
        assert oracles.relative(actual, wanted) <= 1.05 * oracles.relative(theirs, wanted) + torch.finfo(dtype).eps / 2


def test_a_norm_whose_parameters_are_frozen():
    role = ROLES["layer"]
    x, weight, bias = normal(9, 6), normal(6, seed=3, grad=False), normal(6, seed=4, grad=False)
    ours, _ = normed(role, FULL["sampled"], x, weight, bias)
    equal(gradients(ours, [x]), gradients(reference(role, x, weight, bias), [x]), 1e-11)


def test_a_norm_with_a_bias_and_no_weight():
    role = NormRole(centred=True, offset=0.0, eps=1e-5, weight=None, bias="bias")
    x, bias = normal(9, 6), normal(6, seed=4)
    ours, _ = normed(role, Exact(), x, None, bias)
    equal(gradients(ours, (x, bias)), gradients(reference(role, x, None, bias), (x, bias)), 1e-11)


# act(gate) * up


@full
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("has_up", [True, False], ids=["up", "lone"])
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6)])
def test_gated_equals_autograd(codec, activation, has_up, shape):
    gate, up = normal(*shape), normal(*shape, seed=1) if has_up else None
    ours, call = multiplied(gate, up, codec, activation)
    plain = activation(gate) * up if has_up else activation(gate)
    assert torch.equal(ours, plain)
    equal(gradients(ours, present(gate, up)), gradients(plain, present(gate, up)))
    g, dense = normal(call.output.shape[0], 2, seed=5, grad=False), plain.detach().reshape(-1, 6)
    equal([call.output.decode(), call.output.contract(g)], [dense, g.T @ dense])


@full
@pytest.mark.parametrize("has_up", [True, False], ids=["up", "lone"])
def test_gated_gradcheck(codec, has_up):
    def function(gate, *up):
        return multiplied(gate, up[0] if up else None, codec)[0]

    assert torch.autograd.gradcheck(function, tuple(present(normal(5, 4), normal(5, 4, seed=1) if has_up else None)))


@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_gated_with_one_frozen_operand(frozen):
    gate, up = normal(5, 4, grad=frozen != "gate"), normal(5, 4, seed=1, grad=frozen != "up")
    wanted = up if frozen == "gate" else gate
    equal(gradients(multiplied(gate, up, Exact())[0], [wanted]), gradients(functional.silu(gate) * up, [wanted]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gated_in_16_bits_is_as_good_as_autograd(dtype):
    wide = normal(200, 32), normal(200, 32, seed=1)
    gate, up = (t.detach().to(dtype).requires_grad_() for t in wide)
    ours, plain = multiplied(gate, up, Exact())[0], functional.silu(gate) * up
    assert torch.equal(ours, plain)
    truth = gradients(functional.silu(wide[0]) * wide[1], wide)
    for actual, theirs, wanted in zip(gradients(ours, (gate, up)), gradients(plain, (gate, up)), truth, strict=True):
        assert oracles.relative(actual, wanted) <= 1.05 * oracles.relative(theirs, wanted) + torch.finfo(dtype).eps / 2


# What all of them share


def _adapter(codec, x):
    weight = normal(3, 16, seed=1, dtype=x.dtype)
    return product(x, weight, codec), [x, weight], lambda: x @ weight.T


def _norm(codec, x):
    role = ROLES["layer"]
    weight, bias = parameters(role, 16, dtype=x.dtype)
    return normed(role, codec, x, weight, bias)[0], [x, weight, bias], lambda: reference(role, x, weight, bias)


def _gated(codec, x):
    up = normal(64, 16, seed=1, dtype=x.dtype)
    return multiplied(x, up, codec)[0], [x, up], lambda: functional.silu(x) * up


every_function = pytest.mark.parametrize("function", [_adapter, _norm, _gated])


@full
@every_function
def test_saved_tensors_pass_through_hooks(function, codec):
    """Offloading works: whatever backward reads went through save_for_backward."""
    stored = []

    def pack(tensor):
        stored.append(tensor.detach().clone())
        return len(stored) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: stored[place]):
        ours, inputs, plain = function(codec, normal(64, 16))
    assert stored
    equal(gradients(ours, inputs), gradients(plain(), inputs), 1e-11)


@pytest.mark.parametrize("codec", [FULL["sampled"], Quantized(bits=8, group=16)], ids=["sampled", "8-bit"])
@every_function
def test_nothing_outlives_the_graph(function, codec):
    """No reference cycle holds a packed tensor: memory returns without the garbage collector."""
    ends = []

    def pack(tensor):
        ends.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function(codec, normal(64, 16))
        assert any(end() is not None for end in ends)
        del result
        assert all(end() is None for end in ends)
    finally:
        gc.enable()


@full
@every_function
def test_a_retained_graph_gives_the_same_gradients_twice(function, codec):
    ours, inputs, _ = function(codec, normal(64, 16))
    upstream = normal(*ours.shape, seed=7, grad=False)
    first = torch.autograd.grad(ours, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(ours, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@full
@every_function
def test_the_global_generator_is_not_drawn_from(function, codec):
    state = torch.get_rng_state()
    ours, inputs, _ = function(codec, normal(64, 16))
    gradients(ours, inputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("codec", [LowRank(rank=4), Quantized(bits=8, group=16)], ids=["rank", "8-bit"])
@every_function
def test_a_nan_reaches_every_gradient_that_it_reaches_in_autograd(function, codec):
    x = normal(64, 16)
    with torch.no_grad():
        x[3, 2] = torch.nan
    ours, inputs, plain = function(codec, x)
    expected = gradients(plain(), inputs)
    assert not all(torch.isfinite(g).all() for g in expected)
    for actual, wanted in zip(gradients(ours, inputs), expected, strict=True):
        assert torch.isfinite(wanted).all() or not torch.isfinite(actual).all()


@full
@every_function
def test_any_layout_of_activation_and_gradient(function, codec):
    x = normal(16, 64).detach().T.requires_grad_()
    assert not x.is_contiguous()
    ours, inputs, plain = function(codec, x)
    upstream = normal(ours.shape[1], seed=5, grad=False).expand(ours.shape)
    expected = torch.autograd.grad(plain(), inputs, upstream)
    equal(torch.autograd.grad(ours, inputs, upstream), expected, 1e-11)


@every_function
def test_an_edit_in_place_is_an_error_where_the_tensor_itself_is_kept(function):
    leaf = normal(64, 16)
    for codec, fails in ((Exact(), True), (Quantized(bits=8, group=16), False)):
        x = leaf * 1
        ours, _, _ = function(codec, x)
        x.add_(1)
        if fails:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(ours, [leaf])
        else:
            assert torch.isfinite(gradients(ours, [leaf])[0]).all()


@full
def test_readers_of_a_norm_share_what_it_keeps(codec):
    """q, k and v read one packed tensor; where the output is recomputed, one recomputation serves all three."""
    role, runs = ROLES["layer"], []
    x, (weight, bias) = normal(9, 6), parameters(role, 6)
    adapters = [normal(2, 6, seed=s) for s in (10, 11, 12)]

    def forward(t):
        runs.append(1)
        return reference(role, t, weight, bias)

    call = NormCall(role=role, forward=forward, lossy=not isinstance(codec, Exact), encode=lambda t: encode(codec, t))
    y = norm(x, weight, bias, call)
    ours = torch.cat([adapter_product(y, a, call.output, lambda t, a=a: t @ a.T) for a in adapters], dim=1)
    plain = torch.cat([reference(role, x, weight, bias) @ a.T for a in adapters], dim=1)
    inputs = [x, weight, bias, *adapters]
    equal(gradients(ours, inputs), gradients(plain, inputs), 1e-11)
    assert len(runs) == (2 if isinstance(codec, Exact) else 1)


ROWS, FEATURES, RANK = 256, 64, 8
FACTORS = RANK * (ROWS + FEATURES) * 4
ERROR = 4
"""The packed tensor's own error estimate, one number."""


def test_saved_bytes_of_an_adapter_are_its_factors():
    x = normal(ROWS, FEATURES, dtype=torch.float32)
    weight = normal(4, FEATURES, seed=1, dtype=torch.float32)
    measured, _ = saved_bytes(lambda: product(x, weight, LowRank(rank=RANK)), (x, weight))
    assert FACTORS <= measured <= FACTORS + ERROR
    assert saved_bytes(lambda: product(x * 2, weight, Exact()), (x, weight))[0] == x.nbytes


def test_saved_bytes_of_a_norm_are_its_factors_and_statistics():
    role = ROLES["layer"]
    x = normal(ROWS, FEATURES, dtype=torch.float32)
    weight, bias = parameters(role, FEATURES, dtype=torch.float32)
    outputs = []

    def forward():
        y, call = normed(role, LowRank(rank=RANK), x, weight, bias)
        outputs.append(call.output)
        return y

    measured, _ = saved_bytes(forward, present(x, weight, bias))
    rstd, vectors = 4 * ROWS, 2 * 4 * FEATURES  # columns 1/s for the norm, w/s for readers of its output
    assert FACTORS + rstd + vectors <= measured <= FACTORS + rstd + vectors + ERROR
    exact, _ = saved_bytes(lambda: normed(role, Exact(), x * 2, weight, bias)[0], present(x, weight, bias))
    assert exact == x.nbytes


def test_saved_bytes_of_a_gate_are_the_factors_of_both_operands():
    gate, up = (normal(ROWS, FEATURES, seed=s, dtype=torch.float32) for s in (0, 1))
    calls = []

    def forward():
        out, call = multiplied(gate, up, LowRank(rank=RANK))
        calls.append(call)
        return out

    measured, _ = saved_bytes(forward, (gate, up))
    assert 2 * FACTORS <= measured <= 2 * (FACTORS + ERROR)
