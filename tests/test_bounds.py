"""The theory, executed: bounds hold as often as they claim, identities hold above their floors."""

import math

import numpy as np
import pytest
import torch

import oracles
from loract.bounds import coherence, failure_probability, posterior_error, posterior_floor, sampled_bound
from loract.rangefinder import Sampled


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_coherence_of_extremes(rank):
    spread = np.kron(np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]]), [[1, 1], [1, -1]]) / math.sqrt(8)
    assert coherence(torch.from_numpy(spread)[:, :rank]) == pytest.approx(1)
    assert coherence(torch.eye(8)[:, :rank]) == pytest.approx(8 / rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_coherence_is_the_largest_row(dtype):
    u = oracles.orthonormal(20, 4, generator()).to(dtype)
    expected = max(20 / 4 * sum(float(v) ** 2 for v in row) for row in u)
    assert coherence(u) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tail", [0.05, 0.7])
@pytest.mark.parametrize(("rank", "samples", "epsilon"), [(2, 16, 0.7), (3, 32, 0.7), (4, 32, 0.9), (2, 12, 0.95)])
def test_sampled_bound_holds_as_often_as_claimed(rank, samples, epsilon, tail):
    features, tokens, draws = 64, 80, 150
    v = oracles.cosines(features, features)
    spectrum = torch.cat([torch.full((rank,), 1.0), torch.full((features - rank,), tail)]).double()
    x = (oracles.orthonormal(tokens, features, generator()) * spectrum) @ v.T
    allowed = failure_probability(rank, samples, coherence(v[:, :rank]), epsilon)
    bound = sampled_bound(tail, features, samples, epsilon)
    assert 0 < allowed < 0.4, "the claim must say something"
    finder = Sampled(sample="features", weights="uniform", oversample=0)
    failures = 0
    for seed in range(draws):
        p = finder.basis(x, samples, generator(seed))
        failures += np.linalg.norm((x - x @ p @ p.T).numpy(), 2) > bound
    assert failures <= allowed * draws


def test_uniform_sampling_misses_the_bound_where_coherence_is_largest():
    """The probability depends on coherence for a reason: one feature alone carries the leading direction."""
    x = torch.zeros(80, 64, dtype=torch.float64)
    x[0, 0] = 1.0
    x[1:, 1:] = 0.01 * oracles.prescribed(torch.ones(63).double(), 79, 63, generator())
    finder = Sampled(sample="features", weights="uniform", oversample=0)
    bases = [finder.basis(x, 8, generator(seed)) for seed in range(40)]
    failures = sum(np.linalg.norm((x - x @ p @ p.T).numpy(), 2) > sampled_bound(0.01, 64, 8, 0.9) for p in bases)
    assert failure_probability(1, 8, coherence(torch.eye(64)[:, :1]), 0.9) > 0.9
    assert failures >= 30  # the feature is drawn once in eight times


def test_sampled_bound_formula():
    assert sampled_bound(2.0, 60, 8, 0.5) == pytest.approx(2.0 * (1 + 60 / 4) ** 0.25)
    values = [sampled_bound(1.0, 64, samples, 0.5) for samples in (4, 8, 16, 64)]
    assert values == sorted(values, reverse=True)


def test_failure_probability_formula():
    expected = 3 * (math.exp(-0.5) / 0.5**0.5) ** (90 / (1.5 * 3))
    assert failure_probability(3, 90, 1.5, 0.5) == pytest.approx(expected)
    assert failure_probability(3, 1, 1.0, 0.5) == 1.0
    values = [failure_probability(2, samples, 1.0, 0.7) for samples in (16, 32, 64)]
    assert values == sorted(values, reverse=True)


def _posterior(x, rank):
    """Estimate and truth for the factors C = X P, P in x's dtype."""
    p = torch.linalg.qr(torch.randn(x.shape[1], rank, dtype=torch.float64, generator=generator(5))).Q
    _, _, vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
    p = torch.from_numpy(vt[:rank].T.copy()) if rank < x.shape[1] else p
    p = p.to(x.dtype)
    c = x @ p
    total = torch.linalg.vector_norm(x.double()).square().to(torch.promote_types(x.dtype, torch.float32))
    captured = torch.linalg.vector_norm(c.double()).square()
    return float(posterior_error(total, captured)), oracles.relative(c.double() @ p.double().T, x)


@pytest.mark.parametrize("rank", [1, 4, 20])
@pytest.mark.parametrize("kind", ["slow", "fast", "exponential"])
def test_posterior_error_is_pythagoras(kind, rank):
    x = oracles.prescribed(oracles.decaying(32, kind), 60, 32, generator())
    estimate, true = _posterior(x, rank)
    assert estimate == pytest.approx(true, rel=1e-8)
    assert true == pytest.approx(oracles.optimum(x, rank), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiple", [1.0, 3.0])
def test_posterior_error_is_right_above_its_floor(dtype, multiple):
    tail = posterior_floor(dtype) * multiple
    spectrum = torch.tensor([1.0, 1.0, 1.0, 1.0, 2 * tail / math.sqrt(1 - tail**2)]).double()
    x = oracles.prescribed(spectrum, 60, 32, generator()).to(dtype)
    estimate, true = _posterior(x, 4)
    assert true == pytest.approx(tail, rel=0.05)
    assert estimate == pytest.approx(true, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_posterior_error_cancels_below_its_floor(dtype):
    """Why the floor exists: far below it the estimate is off by more than half of the truth."""
    tail = posterior_floor(dtype) / 100
    worst = 0.0
    for seed in range(10):
        x = oracles.prescribed(torch.tensor([1.0, 1, 1, 1, 2 * tail]).double(), 60, 32, generator(seed)).to(dtype)
        estimate, true = _posterior(x, 4)
        worst = max(worst, abs(estimate - true) / true)
    assert worst > 0.5


def test_posterior_floor_by_dtype():
    assert posterior_floor(torch.float64) == 1e-6
    assert posterior_floor(torch.float32) == 1e-2
    assert posterior_floor(torch.bfloat16) == posterior_floor(torch.float16) == 5e-2


@pytest.mark.parametrize(
    ("total", "captured", "error"),
    [(4.0, 4.0, 0.0), (4.0, 0.0, 1.0), (4.0, 3.0, 0.5), (4.0, 4.0001, 0.0), (0.0, 0.0, 0.0)],
)
def test_posterior_error_of_extremes(total, captured, error):
    assert float(posterior_error(torch.tensor(total), torch.tensor(captured))) == pytest.approx(error)


@pytest.mark.parametrize(("total", "captured"), [(torch.nan, 1.0), (1.0, torch.nan), (torch.inf, torch.inf)])
def test_posterior_error_passes_nan_on(total, captured):
    assert torch.isnan(posterior_error(torch.tensor(total), torch.tensor(captured)))
