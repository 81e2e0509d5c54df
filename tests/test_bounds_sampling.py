"""Sketches: bounds hold for every test matrix, over many seeds; where they are sharp, and how loose at most."""

import itertools
import math

import numpy as np
import pytest
import torch

import oracles
from loract.bounds import (
    coherence,
    failure_probability,
    gaussian_bound,
    missed_probability,
    numerical_rank,
    sampled_bound,
    sampled_floor,
    sketch_bound,
)
from loract.errors import InvalidSpec
from loract.rangefinder import Gaussian, Sampled, _draw

TOKENS, FEATURES, RANK, COLUMNS = 40, 24, 6, 9
SLACK = 1 + 1e-9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(kind, seed):
    if kind == "outliers":
        return oracles.outlier_channels(TOKENS, FEATURES, generator(seed))
    return oracles.prescribed(oracles.decaying(FEATURES, kind), TOKENS, FEATURES, generator(seed))


def gaussian(x, seed):
    return torch.randn(len(x), COLUMNS, dtype=x.dtype, generator=generator(seed))


def features(x, seed):
    return x[:, torch.randperm(x.shape[1], generator=generator(seed))[:COLUMNS]]


def tokens(x, seed):
    return torch.eye(len(x), dtype=x.dtype)[:, torch.randperm(len(x), generator=generator(seed))[:COLUMNS]]


def powered(x, seed):
    return x @ (x.T @ features(x, seed))


def errors(x, basis):
    """||X - X P P^T|| in the spectral and the Frobenius norm."""
    residual = (x - x @ basis @ basis.T).numpy()
    return np.linalg.norm(residual, 2), np.linalg.norm(residual)


def spanning(x, test):
    return torch.from_numpy(np.linalg.qr((x.T @ test).numpy())[0])


def best(x, basis, rank):
    """The best `rank` directions of range(basis) for x."""
    return basis @ torch.from_numpy(np.linalg.svd((x @ basis).numpy())[2][:rank].T.copy())


LOOSE = {"slow": 1.25, "fast": 1.15, "exponential": 1.2, "flat": 1.01, "outliers": 1.5}
"""Median of bound over measured, at most: Frobenius, the best six of nine sampled features kept."""


@pytest.mark.parametrize("kind", LOOSE)
@pytest.mark.parametrize("draw", [gaussian, features, tokens, powered])
def test_any_sketch_keeps_its_bound(draw, kind):
    ratios = []
    for seed in range(30):
        x = matrix(kind, seed)
        test = draw(x, 1000 + seed)
        basis, bound = spanning(x, test), sketch_bound(x, test, RANK)
        spectral, frobenius = errors(x, basis)
        assert spectral <= bound.spectral * SLACK
        assert frobenius <= bound.frobenius * SLACK
        kept_spectral, kept_frobenius = errors(x, best(x, basis, RANK))
        assert kept_spectral <= bound.truncated * SLACK
        assert kept_frobenius <= bound.frobenius * SLACK
        ratios.append(bound.frobenius / kept_frobenius)
    if draw is features:
        assert np.median(ratios) <= LOOSE[kind]


@pytest.mark.parametrize("kind", ["slow", "exponential", "outliers"])
@pytest.mark.parametrize("weights", ["uniform", "norm2"])
def test_the_library_s_samples_keep_the_bound(kind, weights):
    for seed, extra in itertools.product(range(15), (0, 3)):
        x = matrix(kind, seed)
        finder = Sampled(weights=weights, oversample=extra, max_tokens=None)
        columns = x.square().sum(0) if weights == "norm2" else None
        drawn = _draw(columns, FEATURES, RANK + extra, generator(seed), x.device)
        bound = sketch_bound(x, x[:, drawn], RANK)
        spectral, frobenius = errors(x, finder.basis(x, RANK, generator(seed)))
        assert spectral <= bound.truncated * SLACK
        assert frobenius <= bound.frobenius * SLACK


def test_a_sketch_of_some_tokens_is_a_sketch():
    """Reading X_T alone is the test matrix whose other rows are zero."""
    for seed in range(15):
        x = matrix("fast", seed)
        finder = Sampled(weights="uniform", oversample=0, max_tokens=20)
        g = generator(seed)
        rows = _draw(None, TOKENS, 20, g, x.device)
        test = torch.zeros(TOKENS, RANK, dtype=x.dtype)
        test[rows] = x[rows][:, _draw(None, FEATURES, RANK, g, x.device)]
        spectral, frobenius = errors(x, finder.basis(x, RANK, generator(seed)))
        bound = sketch_bound(x, test, RANK)
        assert spectral <= bound.spectral * SLACK
        assert frobenius <= bound.frobenius * SLACK


def test_the_sketch_bound_is_the_optimum_for_the_leading_directions():
    x = matrix("slow", 0)
    u, values, _ = np.linalg.svd(x.numpy())
    bound = sketch_bound(x, torch.from_numpy(u[:, :RANK].copy()), RANK)
    assert bound.spectral == pytest.approx(values[RANK])
    assert bound.frobenius == pytest.approx(np.linalg.norm(values[RANK:]))


def test_the_sketch_bound_is_sharp_below_a_gap():
    """What is lost beyond the optimum equals the bound's excess as the gap widens and the sketch nears the truth."""
    spectrum = torch.cat([torch.full((3,), 1.0), torch.full((9,), 1e-3)]).double()
    x = oracles.prescribed(spectrum, 20, 12, generator())
    u = torch.from_numpy(np.linalg.svd(x.numpy())[0])
    test = u[:, :3] + 0.3 * u[:, 3:12] @ torch.randn(9, 3, dtype=torch.float64, generator=generator(1))
    _, frobenius = errors(x, spanning(x, test))
    optimum = 9 * 1e-6
    assert (frobenius**2 - optimum) / (sketch_bound(x, test, 3).frobenius ** 2 - optimum) == pytest.approx(1, abs=1e-3)


def test_the_spectral_bound_is_below_its_textbook_form():
    for seed in range(20):
        x = matrix("slow", seed)
        test = features(x, seed)
        u, values, _ = np.linalg.svd(x.numpy())
        projected = u.T @ test.numpy()
        tail = np.zeros(TOKENS - RANK)
        tail[: FEATURES - RANK] = values[RANK:]
        excess = tail[:, None] * (projected[RANK:] @ np.linalg.pinv(projected[:RANK]))
        textbook = math.sqrt(values[RANK] ** 2 + np.linalg.norm(excess, 2) ** 2)
        assert values[RANK] <= sketch_bound(x, test, RANK).spectral <= textbook * SLACK


def test_a_sketch_that_misses_a_direction_has_no_bound():
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert sketch_bound(x, torch.eye(3)[:, 1:], 1).frobenius == math.inf
    with pytest.raises(InvalidSpec, match="rank=3"):
        sketch_bound(x, torch.eye(3)[:, :2], 3)


# Means over draws


@pytest.mark.parametrize("kind", ["slow", "fast", "exponential"])
@pytest.mark.parametrize("oversample", [2, 6])
def test_gaussian_sketches_keep_their_mean(kind, oversample):
    spectrum = oracles.decaying(FEATURES, kind)
    x = oracles.prescribed(spectrum, TOKENS, FEATURES, generator())
    finder = Gaussian(oversample=oversample)
    found = [errors(x, finder.basis(x, 6, generator(seed)))[1] ** 2 for seed in range(150)]
    bound = gaussian_bound(spectrum, 6, oversample)
    assert np.mean(found) <= bound**2
    assert bound <= 2.3 * math.sqrt(np.mean(found))


def haar_sample(spectrum, seed, columns):
    x = oracles.prescribed(spectrum, TOKENS, len(spectrum), generator(seed))
    return x, spanning(x, x[:, :columns])


@pytest.mark.parametrize("kind", ["slow", "fast", "exponential"])
def test_samples_are_half_a_power_iteration_where_no_feature_is_special(kind):
    spectrum = oracles.decaying(FEATURES, kind)
    sampled = [errors(*haar_sample(spectrum, seed, 9))[1] ** 2 for seed in range(200)]
    x = oracles.prescribed(spectrum, FEATURES, FEATURES, generator())
    draws = (torch.randn(FEATURES, 9, dtype=torch.float64, generator=generator(s)) for s in range(200))
    ahead = [errors(x, spanning(x, x @ g))[1] ** 2 for g in draws]  # X^T X G
    assert np.mean(sampled) == pytest.approx(np.mean(ahead), rel=0.05)
    bound = gaussian_bound(spectrum, 6, 3, exponent=2)
    assert np.mean(sampled) <= bound**2 <= 3 * np.mean(sampled)


@pytest.mark.parametrize("kind", ["slow", "fast", "exponential", "flat"])
def test_more_power_never_raises_the_gaussian_bound(kind):
    spectrum = oracles.decaying(FEATURES, kind)
    for rank in range(1, FEATURES):
        values = [gaussian_bound(spectrum, rank, 3, exponent) for exponent in (1, 2, 3, 5)]
        assert values == sorted(values, reverse=True)
        ratio = float(spectrum[rank] / spectrum[rank - 1])
        tail = float(spectrum[rank:].square().sum())
        assert values[1] ** 2 - tail <= ratio**2 * (values[0] ** 2 - tail) * SLACK


@pytest.mark.parametrize("given", [{"rank": 0}, {"oversample": 1}, {"exponent": 0}, {"rank": 3}])
def test_gaussian_bound_says_what_it_needs(given):
    with pytest.raises(InvalidSpec, match="p >= 2"):
        gaussian_bound(torch.tensor([1.0, 0.5, 0.0]), **{"rank": 1, "oversample": 2, **given})


# Exact recovery


def test_recovery_is_exact_if_and_only_if_the_ranks_agree():
    found = set()
    for seed in range(60):
        g = generator(seed)
        right = torch.randn(4, 20, dtype=torch.float64, generator=g)
        right *= (torch.rand(4, 20, generator=g) < 0.25).double()  # few features carry each direction
        x = torch.randn(30, 4, dtype=torch.float64, generator=g) @ right
        sample = x[:, torch.randperm(20, generator=g)[:6]]
        test = numerical_rank(sample) == numerical_rank(x)
        values = np.linalg.svd((x.T @ sample).numpy())
        kept = torch.from_numpy(values[0][:, : int((values[1] > 1e-10 * values[1][0]).sum())].copy())
        assert (errors(x, kept)[1] < 1e-8 * float(x.norm())) == test
        found.add(test)
    assert found == {True, False}


def test_recovery_fails_as_rarely_as_claimed():
    """Each feature shows one of four directions: mu = 1, and a sample recovers all if it meets every direction."""
    right = torch.eye(4, dtype=torch.float64).repeat(1, 10)
    assert coherence(right.T / math.sqrt(10)) == pytest.approx(1)
    x = torch.randn(20, 4, dtype=torch.float64, generator=generator()) @ right
    for samples in (8, 12, 16):
        finder = Sampled(weights="uniform", oversample=0)
        bases = [finder.basis(x, samples, generator(seed)) for seed in range(100)]
        failures = np.mean([errors(x, basis)[1] > 1e-6 * float(x.norm()) for basis in bases])
        # QR fills a deficient sketch with arbitrary columns, which may catch part of what is missing: never all of it.
        assert failures <= failure_probability(4, samples, 1.0, 1.0)
        exact = 1 - sum(
            (-1) ** j * math.comb(4, j) * math.comb(40 - 10 * j, samples) / math.comb(40, samples) for j in range(5)
        )
        assert failures == pytest.approx(exact, abs=0.13)
        assert failure_probability(4, samples, 1.0, 1.0) >= exact


# Probability


@pytest.mark.parametrize(("samples", "epsilon"), [(8, 0.9), (8, 0.95), (10, 0.8), (12, 0.7)])
@pytest.mark.parametrize("spread", ["cosines", "haar"])
def test_chernoff_against_every_sample_there_is(samples, epsilon, spread):
    u = oracles.cosines(14, 2) if spread == "cosines" else oracles.orthonormal(14, 2, generator(3))
    every = torch.tensor(list(itertools.combinations(range(14), samples)))
    rows = u[every]
    least = np.linalg.eigvalsh((rows.mT @ rows).numpy())[:, 0]
    share = np.mean(least < (1 - epsilon) * samples / 14)
    assert share <= failure_probability(2, samples, coherence(u), epsilon)


def test_the_gap_helps_the_sampled_bound():
    assert sampled_bound(1.0, 64, 16, 0.5, sigma=1.0) == sampled_bound(1.0, 64, 16, 0.5) == 8**0.25
    assert sampled_bound(1.0, 64, 16, 0.5, sigma=10.0) == pytest.approx(math.sqrt(1 + 7 / 100))


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("samples", [1, 4, 9])
def test_a_matrix_on_which_every_sample_errs_by_the_floor(size, samples):
    share = math.sqrt(samples / size)
    v = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    # The symmetric root of I + v v^T / c: singular values sqrt(1 + 1 / c), 1, 1, ...
    x = torch.eye(size, dtype=torch.float64) + (math.sqrt(1 + 1 / share) - 1) * v @ v.T
    assert coherence(v) == pytest.approx(1)
    for seed in range(3):
        drawn = torch.randperm(size, generator=generator(seed))[:samples]
        spectral, _ = errors(x, spanning(x, x[:, drawn]))
        assert spectral == pytest.approx(sampled_floor(size, samples), rel=1e-9)
    assert sampled_floor(size, samples) <= sampled_bound(1.0, size, samples, 0.0) * SLACK
    assert sampled_bound(1.0, size, samples, 0.0) <= math.sqrt(2) * sampled_floor(size, samples)


def test_no_absolute_constant_serves_the_circulating_form():
    """(1 + C sqrt(mu k / l)) sigma_(k+1) at mu = k = 1 and l = 4: the C that is needed grows without end."""
    needed = [(sampled_floor(size, 4) - 1) * math.sqrt(4) for size in (16, 256, 4096, 1 << 16, 1 << 20, 1 << 24)]
    assert all(later > 1.8 * earlier for earlier, later in itertools.pairwise(needed))
    assert needed[-1] > 60


# Outlier channels


def lonely(share, seed=0):
    """A feature that is orthogonal to all others and has this share of the energy."""
    rest = oracles.prescribed(torch.ones(23).double(), 39, 23, generator(seed))
    x = torch.zeros(40, 24, dtype=torch.float64)
    x[1:, 1:] = rest / rest.norm() * math.sqrt(1 - share)
    x[0, 0] = math.sqrt(share)
    return x


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_uniform_samples_miss_a_lonely_channel_and_weighted_ones_do_not(share):
    x, count, draws = lonely(share), 6, 300
    missed = {}
    for weights in ("uniform", "norm2"):
        finder = Sampled(weights=weights, oversample=0, max_tokens=None)
        found = [errors(x, finder.basis(x, count, generator(seed)))[0] for seed in range(draws)]
        lost = [spectral for spectral in found if spectral >= math.sqrt(share) * (1 - 1e-6)]
        missed[weights] = len(lost) / draws
    deviation = 3 / math.sqrt(draws) / 2
    assert missed["uniform"] == pytest.approx(1 - count / 24, abs=deviation)
    assert missed["norm2"] <= missed_probability(share, count) + deviation
    assert missed_probability(share, count) < 1 - count / 24


def test_gaussian_sketches_do_not_care_where_a_channel_lies():
    """One spectrum, its leading direction one feature or all of them: samples tell the difference, Gaussians do not."""
    spectrum = torch.cat([torch.tensor([1.0]), torch.full((23,), 0.1)]).double()
    left = oracles.orthonormal(40, 24, generator())
    concentrated, spread = left * spectrum, (left * spectrum) @ oracles.cosines(24, 24).T
    g = torch.randn(40, 5, dtype=torch.float64, generator=generator(1))
    assert sketch_bound(concentrated, g, 1).frobenius == pytest.approx(sketch_bound(spread, g, 1).frobenius)
    assert sketch_bound(concentrated, concentrated[:, 5:10], 1).frobenius == math.inf
    assert sketch_bound(spread, spread[:, 5:10], 1).frobenius < sketch_bound(spread, g, 1).frobenius
