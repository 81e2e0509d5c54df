"""Gradients from coded activations: bounds over many draws, cases of equality, and how loose they are."""

import itertools
import math

import numpy as np
import pytest
import torch

import oracles
from loract.bounds import (
    accumulated_bound,
    attention_backward_bound,
    captured_share,
    contraction_bound,
    contraction_mean,
    norm_backward_bound,
    propagated_bound,
)
from loract.codecs import LowRank, Quantized
from loract.errors import InvalidSpec
from loract.functions.norm import NormCall, NormRole, metric, norm
from oracles import normal

SLACK = 1 + 1e-9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# A linear map


@pytest.mark.parametrize(
    "codec", [LowRank(rank=4, guard=False), Quantized(bits=3, group=16)], ids=["low rank", "3 bits"]
)
def test_a_contraction_keeps_its_bound(codec):
    ratios = []
    for seed in range(20):
        g = generator(seed)
        x = oracles.prescribed(oracles.decaying(32, "slow"), 64, 32, g)
        upstream, packed = normal(64, 5, g=g), codec.encode(x)
        measured = float((packed.contract(upstream) - upstream.T @ x).norm())
        bound = contraction_bound(upstream, packed.decode() - x)
        assert measured <= bound * SLACK
        ratios.append(bound / measured)
    assert np.median(ratios) <= 3.5


def test_the_contraction_bound_is_sharp():
    u, v = torch.linspace(1, 2, 6).double(), torch.linspace(-1, 3, 4).double()
    upstream, error = torch.outer(u, torch.tensor([0.5, 2.0]).double()), torch.outer(u, v)
    assert float((upstream.T @ error).norm()) == pytest.approx(contraction_bound(upstream, error))


def test_rounding_errs_as_its_mean_says():
    """Stochastic rounding of every value by itself: rows of the error are independent."""
    g = generator()
    x, upstream = normal(128, 16, g=g), normal(128, 3, g=g)
    found, energies = [], []
    for _ in range(200):
        error = (x + torch.rand(x.shape, dtype=x.dtype, generator=g)).floor() - x
        energies.append(float(error.square().sum()))
        found.append(float((upstream.T @ error).square().sum()))
    assert math.sqrt(np.mean(found)) == pytest.approx(contraction_mean(upstream, np.mean(energies), 128), rel=0.05)
    assert contraction_bound(upstream, error) > 2 * contraction_mean(upstream, np.mean(energies), 128)


def test_low_rank_loses_what_of_the_gradient_lies_outside_its_basis():
    g = generator()
    x, upstream = oracles.prescribed(oracles.decaying(32, "slow"), 64, 32, g), normal(64, 5, g=g)
    packed = LowRank(rank=8, guard=False).encode(x)
    exact = upstream.T @ x
    relative = oracles.relative(packed.contract(upstream), exact)
    assert relative**2 == pytest.approx(1 - captured_share(exact, packed.kept[1]), rel=1e-9)


# A norm


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_norm_s_gradient_keeps_its_bound(bits, centred):
    """The library's own backward from coded xhat, against autograd."""
    ratios = []
    for seed in range(15):
        g = generator(seed)
        x, weight, upstream = normal(40, 32, g=g) + 0.5, normal(32, g=g), normal(40, 32, g=g)
        x.requires_grad_()
        exact = torch.autograd.grad(oracles.full_norm(x, weight, None, 1e-6, centred), x, upstream)[0]
        role = NormRole(centred=centred, offset=0.0, eps=1e-6, weight="weight", bias=None)
        kept = []

        def encode(value, kept=kept):
            kept.append((value, Quantized(bits=bits, scale="channel", guard=False).encode(value)))
            return kept[-1][1]

        def forward(t, weight=weight):
            return oracles.full_norm(t, weight, None, 1e-6, centred)

        y = norm(x, weight, None, NormCall(role=role, forward=forward, lossy=True, encode=encode))
        measured = float((torch.autograd.grad(y, x, upstream)[0] - exact).norm())
        (value, packed), s = kept[0], metric(weight)
        rstd, mean = role.statistics(x.detach())
        errors = ((packed.decode() - value) / s).norm(dim=1)
        xhat = role.normalise(x.detach(), rstd, mean)
        bound = norm_backward_bound(upstream * weight, xhat, errors, rstd)
        assert measured <= bound * SLACK
        relative = errors / math.sqrt(32)
        at_most = rstd.flatten() * (upstream * weight).norm(dim=1) * (2 * relative + relative**2)
        assert bound <= float(at_most.norm()) * SLACK
        ratios.append(bound / measured)
    assert 3 <= np.median(ratios) <= 11


def backward(upstream, xhat, rstd):
    return rstd * (upstream - xhat * (upstream * xhat).mean(-1, keepdim=True))


@pytest.mark.parametrize("size", [0.01, 0.5, 3.0])
def test_the_norm_bound_is_reached(size):
    xhat = torch.ones(3, 8, dtype=torch.float64)
    error, rstd = size * xhat, torch.tensor([[0.5], [1.0], [2.0]]).double()
    measured = (backward(xhat, xhat + error, rstd) - backward(xhat, xhat, rstd)).norm()
    assert float(measured) == pytest.approx(norm_backward_bound(xhat, xhat, error.norm(dim=1), rstd))


def test_a_norm_s_gradient_has_no_relative_bound():
    """Upstream along xhat: nothing should come back, and from coded xhat something does."""
    xhat = torch.ones(1, 8, dtype=torch.float64)
    assert float(backward(xhat, xhat, torch.ones(1, 1)).norm()) < 1e-15
    assert float(backward(xhat, 1.01 * xhat, torch.ones(1, 1)).norm()) > 0.05


def test_unbiased_rounding_biases_a_norm_s_gradient_by_its_covariance():
    """E dx' - dx = -(r / n) Cov u, over every outcome of independent two-point errors."""
    g = generator()
    xhat, upstream = normal(1, 4, g=g), normal(1, 4, g=g)
    xhat *= 2 / xhat.norm()
    size = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    outcomes = [xhat + torch.tensor(signs) * size for signs in itertools.product((-1.0, 1.0), repeat=4)]
    mean = torch.stack([backward(upstream, out, torch.ones(1, 1)) for out in outcomes]).mean(0)
    bias = mean - backward(upstream, xhat, torch.ones(1, 1))
    assert torch.allclose(bias, -size.square() * upstream / 4, atol=1e-12)


# Attention


def attend(q, k, v, upstream, scale, mask):
    """Gradients of one head by autograd."""
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    scores = (inputs[0] @ inputs[1].T * scale).masked_fill(~mask, -math.inf)
    return torch.autograd.grad(scores.softmax(-1) @ inputs[2], inputs, upstream)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_attention_s_gradients_keep_their_bounds(bits, causal):
    ratios = []
    for seed in range(20):
        g = generator(seed)
        q, k, v, upstream = (normal(24, 8, g=g) for _ in range(4))
        k = k + 2 * normal(1, 8, g=g)  # a mean that all keys share changes nothing
        mask = torch.ones(24, 24, dtype=torch.bool).tril() if causal else torch.ones(24, 24, dtype=torch.bool)
        codec = Quantized(bits=bits, scale="row", guard=False)
        read = [codec.encode(t).decode() for t in (q, k, v)]
        errors = tuple((a - b).norm(dim=1) for a, b in zip(read, (q, k, v)))
        exact, coded = (attend(*t, upstream, 8**-0.5, mask) for t in ((q, k, v), read))
        bound = attention_backward_bound((q, k, v), upstream, errors, 8**-0.5, mask)
        measured = [float((a - b).norm()) for a, b in zip(coded, exact)]
        assert all(m <= b * SLACK for m, b in zip(measured, bound))
        ratios.append([b / m for m, b in zip(measured, bound)])
    typical = np.median(ratios, axis=0)
    assert (typical <= [160, 230, 55]).all()
    assert (typical >= 10).all(), "far from sharp on random errors, as the page says"


def test_the_bound_on_values_is_sharp_for_two_keys():
    q, v = torch.tensor([[1.0, 0.0]]).double(), torch.eye(2).double()
    k, upstream = torch.zeros(2, 2).double(), torch.tensor([[1.0, 2.0]]).double()
    change = 1e-4 * torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    mask = torch.ones(1, 2, dtype=torch.bool)
    exact, coded = (attend(q, key, v, upstream, 1.0, mask) for key in (k, k + change))
    errors = torch.zeros(1), change.norm(dim=1), torch.zeros(2)
    bound = attention_backward_bound((q, k, v), upstream, errors, 1.0)
    assert float((coded[2] - exact[2]).norm()) / bound.value == pytest.approx(1, rel=1e-6)


def test_a_large_error_meets_a_finite_bound():
    g = generator()
    q, k, v, upstream = (normal(6, 4, g=g) for _ in range(4))
    mask = torch.ones(6, 6, dtype=torch.bool)
    change = tuple(30 * normal(6, 4, g=g) for _ in range(3))
    exact = attend(q, k, v, upstream, 1.0, mask)
    coded = attend(q + change[0], k + change[1], v + change[2], upstream, 1.0, mask)
    bound = attention_backward_bound((q, k, v), upstream, tuple(c.norm(dim=1) for c in change), 1.0)
    assert all(float((a - b).norm()) <= c for a, b, c in zip(coded, exact, bound))
    with pytest.raises(InvalidSpec, match="sees no key"):
        attention_backward_bound((q, k, v), upstream, (torch.zeros(6),) * 3, 1.0, ~mask)


# Layers


WIDTH = 12


class Block:
    """x + W2 tanh(W1 x), for one token; backward may read a coded W1 x."""

    def __init__(self, g, gain):
        self.first = gain * normal(WIDTH, WIDTH, g=g) / math.sqrt(WIDTH)
        self.second = gain * normal(WIDTH, WIDTH, g=g) / math.sqrt(WIDTH)

    def forward(self, x):
        return x + torch.tanh(x @ self.first.T) @ self.second.T

    def jacobian(self, x, error=0.0):
        """d out / d in (WIDTH, WIDTH)."""
        slope = 1 - torch.tanh(x @ self.first.T + error).square()
        return torch.eye(WIDTH, dtype=torch.float64) + (self.second * slope) @ self.first


def chain(depth, size, seed, gain=0.7):
    """Jacobians exact and coded, from the input on, and the loss's gradient at the end."""
    g = generator(seed)
    x, exact, coded = normal(WIDTH, g=g), [], []
    for _ in range(depth):
        block = Block(g, gain)
        exact.append(block.jacobian(x))
        coded.append(block.jacobian(x, size * normal(WIDTH, g=g)))
        x = block.forward(x)
    return exact, coded, normal(WIDTH, g=g)


def spectral(matrix):
    return float(np.linalg.norm(matrix.numpy(), 2))


def back(jacobians, g):
    """Gradients at the input of each layer, and at the end."""
    found = [g]
    for jacobian in reversed(jacobians):
        found.insert(0, jacobian.T @ found[0])
    return found


def test_jacobians_are_autograd_s():
    g = generator()
    block, x = Block(g, 0.7), normal(WIDTH, g=g)
    assert torch.allclose(torch.autograd.functional.jacobian(block.forward, x), block.jacobian(x))


@pytest.mark.parametrize("depth", [1, 4, 12])
@pytest.mark.parametrize("size", [0.03, 0.3])
def test_errors_propagate_within_the_bounds(size, depth):
    products, sums, spreads = [], [], []
    for seed in range(15):
        exact, coded, g = chain(depth, size, seed)
        true, read = back(exact, g), back(coded, g)
        measured = float((read[0] - true[0]).norm())
        changes = [spectral(b - a) for a, b in zip(exact, coded)]
        product = propagated_bound([spectral(a) for a in exact], changes) * float(g.norm())
        local = [float(((b - a).T @ later).norm()) for a, b, later in zip(exact, coded, true[1:])]
        total = accumulated_bound([spectral(b) for b in coded], local)
        assert measured <= total * SLACK
        assert measured <= product * SLACK
        products.append(product / measured)
        sums.append(total / measured)
        spreads.append(measured)
    limits = {1: (3.5, 1.001), 4: (30, 6), 12: (1500, 80)}[depth]
    assert np.median(products) <= limits[0]
    assert np.median(sums) <= limits[1]
    if depth == 12:
        assert np.median(products) >= 100, "exponentially loose in depth, as the page says"


def test_the_propagated_bound_is_reached_by_layers_that_amplify_one_direction():
    exact = [torch.eye(2).double() * a for a in (1.5, 2.0, 0.5)]
    coded = [j * 1.1 for j in exact]
    g = torch.tensor([1.0, 2.0]).double()
    measured = float((back(coded, g)[0] - back(exact, g)[0]).norm())
    bound = propagated_bound([1.5, 2.0, 0.5], [0.15, 0.2, 0.05])
    assert measured == pytest.approx(bound * float(g.norm()))
