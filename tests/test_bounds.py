"""The theory, executed: bounds hold as often as they claim, identities hold above their floors."""

import math

import numpy as np
import pytest
import torch

import oracles
from loract.bounds import (
    coherence,
    decay_gain,
    equal_bytes,
    failure_probability,
    posterior_error,
    posterior_floor,
    posterior_interval,
    rate_distortion,
    sampled_bound,
    water_filling,
)
from loract.codecs import LowRank, Quantized, Transform
from loract.errors import InvalidSpec
from loract.rangefinder import Sampled, Truncated


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
    bound = sampled_bound(tail, features, samples, epsilon, sigma=1.0)
    assert bound <= sampled_bound(tail, features, samples, epsilon)
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
    assert sampled_bound(2.0, 60, 8, 0.5) == pytest.approx(2.0 * (60 / 4) ** 0.25)
    values = [sampled_bound(1.0, 64, samples, 0.5) for samples in (4, 8, 16, 64)]
    assert values == sorted(values, reverse=True)


def test_failure_probability_formula():
    expected = 3 * (math.exp(-0.5) / 0.5**0.5) ** (90 / (1.5 * 3))
    assert failure_probability(3, 90, 1.5, 0.5) == pytest.approx(expected)
    assert failure_probability(3, 1, 1.0, 0.5) == 1.0
    assert failure_probability(3, 20, 1.0, 1.0) == pytest.approx(3 * math.exp(-20 / 3))
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


def _rounded_factors(x, rank):
    """A basis and coefficients in x's dtype; what its rounding did to both; estimate and truth."""
    _, _, vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
    p = torch.from_numpy(vt[:rank].T.copy()).to(x.dtype)
    c = x @ p
    wide, basis, coefficients = x.double(), p.double(), c.double()
    off = float(np.linalg.norm((basis.T @ basis - torch.eye(rank)).numpy(), 2))
    product = float((coefficients - wide @ basis).norm() / wide.norm())
    sums = x.float().square().sum(), c.float().square().sum()
    return off, product, float(posterior_error(*sums)), oracles.relative(coefficients @ basis.T, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", [1e-5, 1e-3, 1e-2, 0.1, 0.5])
def test_the_truth_lies_in_the_posterior_interval(dtype, tail):
    unit = torch.finfo(dtype).eps / 2
    for seed in range(10):
        spectrum = torch.tensor([1.0, 1.0, 1.0, 1.0, 2 * tail / math.sqrt(1 - tail**2)]).double()
        x = oracles.prescribed(spectrum, 60, 32, generator(seed)).to(dtype)
        off, product, estimate, true = _rounded_factors(x, 4)
        low, high = posterior_interval(estimate, basis=off, product=product, sums=2e-6)
        assert low <= true <= high
        # Elementwise rounding of P and of C bounds both figures before anything is measured.
        assert off <= 2 * unit * math.sqrt(4) + 4 * unit**2 + 1e-9
        before = {"basis": 2 * unit * math.sqrt(4) + 4 * unit**2, "product": 4 * unit}
        assert product <= before["product"]
        wide = posterior_interval(estimate, **before, sums=2e-6)
        assert wide[0] <= true <= wide[1]
        if tail**2 > 8 * (off + 2 * product + 4e-6):
            assert high <= 1.2 * low
        if tail**2 < (off + 2 * product) / 8:
            assert low == 0.0


def test_the_posterior_interval_is_sharp():
    """One column, one feature too long or a coefficient too large: the interval's ends are met."""
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    for off in (1e-2, -1e-2):
        p = torch.tensor([[math.sqrt(1 + off)], [0.0]], dtype=torch.float64)
        c = x @ p
        estimate = float(posterior_error(x.square().sum(), c.square().sum()))
        low, high = posterior_interval(estimate, basis=abs(off), product=0.0)
        assert oracles.relative(c @ p.T, x) == pytest.approx(high if off > 0 else low, rel=1e-9)


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


def _bisected(variances, bits):
    """Bits and D(R) by bisection on the water level."""
    low, high = 1e-300, max(variances)
    for _ in range(2000):
        theta = math.sqrt(low * high)
        spent = sum(max(0.0, 0.5 * math.log2(v / theta)) if v > 0 else 0.0 for v in variances)
        low, high = (theta, high) if spent > bits * len(variances) else (low, theta)
    allotted = [max(0.0, 0.5 * math.log2(v / high)) if v > 0 else 0.0 for v in variances]
    return allotted, sum(min(v, high) for v in variances)


SPECTRA = {
    "slow": [1 / i for i in range(1, 31)],
    "fast": [1 / i**2 for i in range(1, 31)],
    "equal": [3.0] * 7,
    "one": [2.5],
    "with zeros": [4.0, 0.0, 1.0, 0.0, 1e-9],
    "unordered": [0.1, 7.0, 0.002, 3.0, 3.0],
}


@pytest.mark.parametrize("bits", [0.0, 0.05, 0.5, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("variances", SPECTRA.values(), ids=SPECTRA)
def test_water_filling_is_the_level_that_spends_the_bits(variances, bits):
    allotted, distortion = water_filling(torch.tensor(variances, dtype=torch.float64), bits)
    expected, least = _bisected(variances, bits)
    assert allotted.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(allotted.sum()) == pytest.approx(bits * len(variances), abs=1e-9)
    assert distortion == pytest.approx(least / sum(variances), rel=1e-9)
    assert rate_distortion(torch.tensor(variances, dtype=torch.float64), bits) == pytest.approx(least, rel=1e-9)


def test_no_other_allocation_of_the_same_bits_errs_less():
    variances = oracles.decaying(12, "fast").square()
    least = rate_distortion(variances, 1.5)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        bits = rng.dirichlet(np.full(12, rng.choice([0.1, 0.5, 2.0]))) * 1.5 * 12
        assert float((variances.numpy() * 4.0**-bits).sum()) >= least * (1 - 1e-12)


def test_distortion_falls_by_6_db_a_bit_once_every_component_has_bits():
    variances = torch.tensor([4.0, 2.0, 1.0])
    assert rate_distortion(variances, 4.0) == pytest.approx(4 * rate_distortion(variances, 5.0))
    assert rate_distortion(variances, 0.0) == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("variances", "bits", "message"),
    [
        (torch.ones(3), -1.0, r"bits=-1\.0.*at least 0"),
        (torch.ones(3), math.nan, "bits=nan"),
        (torch.zeros(3), 1.0, "one above 0"),
        (torch.tensor([1.0, -1.0]), 1.0, "finite variances"),
        (torch.tensor([1.0, math.nan]), 1.0, "finite variances"),
        (torch.ones(2, 2), 1.0, "a vector"),
        (torch.ones(0), 1.0, "a vector"),
    ],
)
def test_invalid_spectra(variances, bits, message):
    with pytest.raises(InvalidSpec, match=message):
        water_filling(variances, bits)


@pytest.mark.parametrize(("bits", "factor"), [(1, 1.45), (2, 1.90), (4, 2.95), (8, 5.7)])
def test_the_gap_of_a_fixed_rate_uniform_quantiser(bits, factor):
    """The factors that `rate_distortion` states, by brute force over steps on Gaussian quantiles."""
    values = math.sqrt(2) * torch.erfinv(2 * (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000 - 1)
    half = 2 ** (bits - 1)
    errors = []
    for step in np.geomspace(0.02, 2, 120):
        levels = (values / step).floor().clamp(-half, half - 1) + 0.5
        errors.append(float((values - step * levels).square().mean()))
    assert min(errors) / rate_distortion(torch.ones(1), bits) == pytest.approx(factor, rel=0.03)
    assert min(errors) / rate_distortion(torch.ones(1), bits) > (math.pi * math.e / 6 if bits > 1 else 1)


# Codes


def _source(spectrum, tokens, seed):
    """Independent Gaussian rows with these variances along directions that are drawn."""
    g = generator(seed)
    values = torch.randn(tokens, len(spectrum), dtype=torch.float64, generator=g) * spectrum
    return (values @ oracles.orthonormal(len(spectrum), len(spectrum), g).T).float()


CODES = {
    "low rank": (LowRank(rank=8, guard=False), math.inf),
    "low rank, coded": (LowRank(rank=8, factor_bits=4, guard=False), 20),
    "transform 1": (Transform(bits=1, guard=False), 15),
    "transform 3": (Transform(bits=3, guard=False), 15),
    "by channel": (Quantized(bits=4, scale="channel", guard=False), 1500),
    "by group": (Quantized(bits=2, group=16, guard=False), math.inf),
}
"""Codecs, and how many times the least squared error theirs may be."""


@pytest.mark.parametrize("kind", ["slow", "fast", "flat"])
@pytest.mark.parametrize(("codec", "most"), CODES.values(), ids=CODES)
def test_no_code_errs_less_than_the_rate_allows(codec, most, kind):
    """The converse: N tokens in B bits, bases and scales among them, err by N D(B / N) at least in the mean."""
    spectrum, tokens = oracles.decaying(32, kind), 256
    errors, sizes = [], []
    for seed in range(4):
        x = _source(spectrum, tokens, seed)
        packed = codec.encode(x)
        errors.append(float((packed.decode() - x).double().square().sum()) / tokens)
        sizes.append(8 * packed.nbytes)
    least = rate_distortion(spectrum.square(), max(sizes) / tokens / 32)
    assert least <= np.mean(errors) <= most * least


def test_transform_coding_stays_near_the_limit_and_low_rank_does_not():
    spectrum, tokens = oracles.decaying(32, "fast"), 2048
    x = _source(spectrum, tokens, 0)
    ratio = {}
    for name, codec in (("low rank", LowRank(rank=4)), ("transform", Transform(bits=4))):
        packed = codec.encode(x)
        error = float((packed.decode() - x).double().square().sum()) / tokens
        ratio[name] = error / rate_distortion(spectrum.square(), 8 * packed.nbytes / tokens / 32)
    assert ratio["transform"] < 8
    assert ratio["low rank"] > 4 * ratio["transform"]


@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("kind", ["slow", "fast", "exponential"])
def test_equal_bytes_brackets_the_codecs(kind, rank):
    """Measured with real codes: transform coding at low rank's bytes lies between the ideal and low rank."""
    spectrum, tokens = oracles.decaying(32, kind), 1024
    x = _source(spectrum, tokens, 1).bfloat16().float()
    kept = LowRank(rank=rank, sampler=Truncated(), guard=False).encode(x)
    budget = kept.nbytes // 2  # in 16 bits
    bits = max(b / 8 for b in range(1, 65) if Transform(bits=b / 8, guard=False).encode(x).nbytes <= budget)
    coded = Transform(bits=bits, guard=False).encode(x)
    found = equal_bytes(spectrum.square(), tokens, rank, bits=16)
    error = oracles.relative(coded.decode(), x)
    assert found.transform <= error * 1.02  # one draw of the source
    assert error <= oracles.relative(kept.decode(), x) == pytest.approx(found.low_rank, rel=0.05)


def test_equal_bytes_of_a_spectrum_that_ends():
    found = equal_bytes(torch.tensor([1.0, 1.0, 0.0, 0.0]), 64, 2)
    assert found.low_rank == 0.0
    assert 0 < found.transform < 1e-3
    assert found.components == 2
    with pytest.raises(InvalidSpec, match="rank=5"):
        equal_bytes(torch.ones(4), 64, 5)


@pytest.mark.parametrize(("decay", "bits"), [(2.0, 4), (1.5, 4), (3.0, 6)])
def test_the_gain_under_a_power_law(decay, bits):
    variances = torch.arange(1, 2049, dtype=torch.float64).pow(-decay)
    beyond = 2048 ** (1 - decay) / (decay - 1)  # what the spectrum has beyond its end
    total = float(variances.sum())
    found = equal_bytes(variances[:2048], 10**12, 20, bits=bits)
    squared = [total * error**2 + beyond for error in (found.transform, found.low_rank)]
    assert squared[0] / squared[1] == pytest.approx(decay_gain(decay, bits), rel=0.1)


def test_the_gain_grows_with_the_decay_and_is_none_at_a_flat_spectrum():
    gains = [decay_gain(decay, 16) for decay in (1.001, 1.1, 1.25, 1.5, 2.0, 3.0)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.99
