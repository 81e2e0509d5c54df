"""Descent with gradients that err: worst cases are met exactly, and floors are where they are said to be."""

import math

import numpy as np
import pytest
import torch

import oracles
from loract.bounds import (
    captured_share,
    carried_mean_bound,
    carried_variance_bound,
    largest_angle,
    progress,
    progress_of_cosine,
    progress_unbiased,
    stale_share,
    stationarity,
    stationarity_unbiased,
)
from loract.errors import InvalidSpec
from loract.optim import ProjectedAdamW, Projection
from loract.rangefinder import Sampled, Truncated
from oracles import normal

SLACK = 1 + 1e-9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Quadratic:
    """f(x) = sum_i h_i x_i^2 / 2 in rotated coordinates: smoothness max h, Polyak-Lojasiewicz constant min h."""

    def __init__(self, curvatures, seed=0):
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)
        q = oracles.orthonormal(len(curvatures), len(curvatures), generator(seed))
        self.matrix = (q * self.curvatures) @ q.T

    def value(self, x):
        return float(x @ self.matrix @ x) / 2

    def gradient(self, x):
        return self.matrix @ x


CURVATURES = [2.0, 1.0, 0.5, 0.2, 0.1]


@pytest.mark.parametrize("error", [0.1, 0.5, 0.9])
def test_descent_with_a_relative_error(error):
    """Random directions of error, and the two worst: too long and too short."""
    f = Quadratic(CURVATURES)
    for seed in range(60):
        g = generator(seed)
        x = normal(5, g=g)
        gradient = f.gradient(x)
        off = normal(5, g=g)
        for direction in (off / off.norm(), gradient / gradient.norm(), -gradient / gradient.norm()):
            used = gradient + error * gradient.norm() * direction
            gained = f.value(x) - f.value(x - used / 2.0)
            assert gained >= progress(error) * float(gradient.square().sum()) / 4.0 / SLACK


@pytest.mark.parametrize("error", [0.1, 0.5, 0.9])
def test_the_progress_is_exact_in_the_worst_case_and_no_step_has_more(error):
    x = torch.tensor([1.0], dtype=torch.float64)  # f = x^2 / 2, L = 1
    worst = {}
    for step in (0.5, 0.9, 1.0, 1.1, 1.5):
        after = [(x - step * (1 + sign * error) * x).square() for sign in (-1, 1)]
        worst[step] = float(1 - max(after))  # of the guaranteed 1 / (2 L) g^2, doubled
    assert worst[1.0] == pytest.approx(progress(error))
    assert max(worst, key=worst.get) == 1.0


def test_nothing_is_guaranteed_at_an_error_of_one():
    assert progress(1.0) == progress(1.7) == 0.0
    x = torch.tensor([1.0])
    assert torch.equal(x - 0 * x, x)  # g' = 0 has the error 1 and goes nowhere


@pytest.mark.parametrize("error", [0.0, 0.3, 0.8])
def test_linear_convergence_under_curvature(error):
    f = Quadratic(CURVATURES)
    for seed in range(10):
        g = generator(seed)
        x = normal(5, g=g)
        for _ in range(30):
            gradient, before, off = f.gradient(x), f.value(x), normal(5, g=g)
            x = x - (gradient + error * gradient.norm() * off / off.norm()) / 2.0
            assert f.value(x) <= (1 - 0.1 / 2.0 * progress(error)) * before * SLACK
    flat = Quadratic([1.0] * 5)
    x = normal(5, g=g)
    after = x - (1 + error) * flat.gradient(x)
    assert flat.value(after) == pytest.approx((1 - progress(error)) * flat.value(x), abs=1e-12)


@pytest.mark.parametrize("cosine", [0.1, 0.6, 0.99])
def test_descent_by_the_cosine_at_the_best_step(cosine):
    f = Quadratic(CURVATURES)
    for seed in range(60):
        g = generator(seed)
        x, off = normal(5, g=g), normal(5, g=g)
        gradient = f.gradient(x)
        unit = gradient / gradient.norm()
        off = off - (off @ unit) * unit
        used = 7.0 * (cosine * unit + math.sqrt(1 - cosine**2) * off / off.norm())
        step = float(gradient @ used) / (2.0 * float(used @ used))
        gained = f.value(x) - f.value(x - step * used)
        assert gained >= progress_of_cosine(cosine) * float(gradient.square().sum()) / 4.0 / SLACK
    flat, x = Quadratic([2.0, 2.0]), torch.tensor([1.0, 0.0]).double()
    used = torch.tensor([cosine, math.sqrt(1 - cosine**2)]).double()
    step = float(flat.gradient(x) @ used) / 2.0
    assert flat.value(x) - flat.value(x - step * used) == pytest.approx(progress_of_cosine(cosine) * 1.0)


@pytest.mark.parametrize("error", [0.05, 0.3, 0.9])
def test_an_error_bounds_the_cosine(error):
    """cos >= sqrt(1 - e^2), reached by the tangent: the cosine's form never promises less."""
    angle = math.asin(error)
    used = torch.tensor([math.cos(angle) ** 2, math.cos(angle) * math.sin(angle)]).double()
    exact = torch.tensor([1.0, 0.0]).double()
    assert float((used - exact).norm()) == pytest.approx(error)
    assert progress_of_cosine(float(used[0] / used.norm())) == pytest.approx(progress(error))
    for seed in range(40):
        off = normal(2, g=generator(seed))
        used = exact + error * off / off.norm()
        assert progress_of_cosine(float(used[0] / used.norm())) >= progress(error) / SLACK


# Unbiased


@pytest.mark.parametrize("variance", [0.1, 1.0, 5.0])
def test_unbiased_gradients_progress_in_the_mean(variance):
    """Every outcome of noise along each axis, so the mean is exact; equality where curvatures agree."""
    for curvatures, equal in (([2.0] * 5, True), (CURVATURES, False)):
        f = Quadratic(curvatures)
        x = normal(5, g=generator())
        gradient, step = f.gradient(x), 1 / (2.0 * (1 + variance))
        noise = math.sqrt(variance * float(gradient.square().sum())) * torch.eye(5).double()
        gained = [f.value(x) - f.value(x - step * (gradient + s * n)) for n in noise for s in (-1, 1)]
        promised = progress_unbiased(variance) * float(gradient.square().sum()) / 4.0
        assert np.mean(gained) >= promised / SLACK
        assert not equal or np.mean(gained) == pytest.approx(promised)


def test_stochastic_rounding_errs_twice_as_much_and_pays_late():
    values = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # evenly between two levels
    nearest = float(torch.minimum(values, 1 - values).square().mean())
    stochastic = float((values * (1 - values)).mean())
    assert (nearest, stochastic) == pytest.approx((1 / 12, 1 / 6), rel=1e-4)
    assert bool((values * (1 - values) >= torch.minimum(values, 1 - values).square()).all())
    for error in (0.1, 0.5, 0.7):
        assert progress_unbiased(2 * error**2) < progress(error) < progress_unbiased(error**2)
    assert progress_unbiased(2 * 0.72**2) > progress(0.72)


# Floors


@pytest.mark.parametrize(("error", "absolute"), [(0.0, 0.0), (0.5, 0.0), (0.3, 0.05), (0.0, 0.2)])
def test_the_least_gradient_is_as_small_as_promised(error, absolute):
    f = Quadratic(CURVATURES)
    for seed in range(10):
        g = generator(seed)
        x = normal(5, g=g)
        start, least = f.value(x), math.inf
        for step in range(1, 201):
            gradient, off = f.gradient(x), normal(5, g=g)
            least = min(least, float(gradient.square().sum()))
            assert least <= stationarity(start, 2.0, step, error=error, absolute=absolute) * SLACK
            size = math.sqrt(error**2 * float(gradient.square().sum()) + absolute**2)
            x = x - (gradient + size * off / off.norm()) / 2.0


@pytest.mark.parametrize("step", [1.0, 0.1, 0.01])
def test_rounding_to_nearest_stops_where_the_floor_is(step):
    """Coordinates of the gradient below half a level count as 0: the floor is reached, and no smaller step helps."""
    f, level = Quadratic([1.0] * 4, 0), 0.2
    x = torch.full((4,), 0.0999, dtype=torch.float64)
    for _ in range(100):
        x = x - step * (f.gradient(x) / level).round() * level
    least = float(f.gradient(x).square().sum())
    absolute = math.sqrt(4) * level / 2
    assert 0.99 * absolute**2 < least <= stationarity(f.value(x), 1.0, 10**9, absolute=absolute)


def test_stochastic_rounding_goes_below_that_floor():
    f, level, found = Quadratic([1.0] * 4, 0), 0.2, {}
    variance = 4 * level**2 / 4  # a value between two levels: at most a quarter of the level's square
    for rate in (0.3, 0.03):
        g, energies = generator(), []
        x = torch.full((4,), 0.0999, dtype=torch.float64)
        start = f.value(x)
        for _ in range(4000):
            gradient = f.gradient(x)
            energies.append(float(gradient.square().sum()))
            noise = torch.rand(4, dtype=torch.float64, generator=g)
            x = x - rate * (gradient / level + noise).floor() * level
        found[rate] = np.mean(energies)
        assert found[rate] <= stationarity_unbiased(start, 1.0, 4000, rate=rate, variance=variance)
    assert found[0.03] < 0.2 * found[0.3] < 0.2 * 4 * (level / 2) ** 2


def test_what_promises_nothing_is_refused():
    with pytest.raises(InvalidSpec, match="relative error in"):
        stationarity(1.0, 1.0, 10, error=1.0)
    with pytest.raises(InvalidSpec, match=r"rate=1\.5"):
        stationarity_unbiased(1.0, 1.0, 10, rate=1.5, variance=1.0)


# Projected


@pytest.mark.parametrize("finder", [Truncated(), Sampled()], ids=["optimal", "sampled"])
def test_a_projected_step_gains_its_share(finder):
    """f(W) = ||W - T||^2 / 2, where the gain is exact, and with unequal curvatures, where it is a bound."""
    for seed in range(20):
        g = generator(seed)
        target = oracles.prescribed(oracles.decaying(12, "slow"), 20, 12, g)
        curvature = torch.rand(20, 12, dtype=torch.float64, generator=g)
        for h, equal in ((torch.ones_like(curvature), True), (curvature, False)):
            gradient = -h * target
            p = finder.basis(gradient, 3, g)
            moved = -gradient @ p @ p.T
            gained = float((h * target.square()).sum() - (h * (moved - target).square()).sum()) / 2
            share = captured_share(gradient, p)
            promised = progress(math.sqrt(1 - share)) * float(gradient.square().sum()) / 2
            assert gained >= promised / SLACK
            assert not equal or gained == pytest.approx(promised)
            assert share == pytest.approx(1 - oracles.projection_error(gradient, p) ** 2)


def test_the_optimal_basis_captures_its_part_of_the_energy():
    for seed in range(20):
        gradient = normal(20, 12, g=generator(seed))
        assert captured_share(gradient, Truncated().basis(gradient, 3, generator())) >= 3 / 12


def test_a_random_basis_captures_k_of_n_in_the_mean():
    gradient = oracles.prescribed(oracles.decaying(12, "fast"), 20, 12, generator())
    shares = [captured_share(gradient, oracles.orthonormal(12, 3, generator(seed))) for seed in range(400)]
    assert np.mean(shares) == pytest.approx(3 / 12, abs=3 * np.std(shares) / 20)


def test_a_stale_basis_captures_what_is_left_at_least():
    f = Quadratic(list(np.linspace(0.1, 1.0, 12)))
    claims = 0
    for seed in range(20):
        g = generator(seed)
        start = oracles.prescribed(oracles.decaying(12, "exponential"), 20, 12, g)
        gradient = start @ f.matrix
        p = Truncated().basis(gradient, 6, g)
        share, weight = captured_share(gradient, p), start
        for _ in range(10):
            weight = weight - 0.03 * weight @ f.matrix @ p @ p.T
            least = stale_share(share, float(gradient.norm()), float((weight - start).norm()), 1.0)
            assert captured_share(weight @ f.matrix, p) >= least / SLACK
            claims += least > 0.3
    assert claims > 30
    assert stale_share(0.9, 1.0, 2.0, 1.0) == 0.0


def test_a_basis_that_is_never_renewed_stops_short():
    target = oracles.prescribed(oracles.decaying(12, "slow"), 20, 12, generator())
    p = Truncated().basis(target, 3, generator())
    weight = torch.zeros_like(target)
    for _ in range(50):
        weight = weight - (weight - target) @ p @ p.T
    assert float((weight - target).norm()) == pytest.approx(oracles.optimum(target, 3) * float(target.norm()))


# Moments through a change of basis


def carried(first, second, change):
    optimiser = ProjectedAdamW([torch.nn.Parameter(torch.zeros(8, 6))], projection=Projection(rank=2, bits=32))
    state = {"first": first, "second": second, "basis": None}
    optimiser._carry(state, change)
    return state["first"], state["second"]


def history(seed, within=False):
    """Gradients with weights that sum to 1, an old basis and a new one."""
    g = generator(seed)
    gradients = normal(9, 8, 6, g=g)
    old, new = oracles.orthonormal(6, 3, g), oracles.orthonormal(6, 3, g)
    weights = torch.rand(9, dtype=torch.float64, generator=g)
    if within:
        gradients = gradients @ old @ old.T
    return gradients, weights / weights.sum(), old, new


def moments(gradients, weights, basis):
    seen = gradients @ basis
    return torch.einsum("t,tij->ij", weights, seen), torch.einsum("t,tij->ij", weights, seen.square())


@pytest.mark.parametrize("within", [False, True])
def test_the_carried_mean_loses_what_the_old_basis_did_not_see(within):
    for seed in range(20):
        gradients, weights, old, new = history(seed, within)
        mean, second = moments(gradients, weights, old)
        after, _ = carried(mean, second, old.T @ new)
        outside = torch.einsum("t,tij->ij", weights, gradients - gradients @ old @ old.T)
        bound = carried_mean_bound(old.T @ new, float(outside.norm()))
        assert float((after - moments(gradients, weights, new)[0]).norm()) <= bound * SLACK + 1e-12
        sine = math.sin(largest_angle(new, old))
        assert bound == pytest.approx(sine * float(outside.norm()), abs=1e-12)
        assert float(after.norm()) <= float(mean.norm()) * SLACK
    assert carried_mean_bound(torch.eye(3)[:2], 1.0) == 1.0


def test_the_mean_bound_is_sharp():
    """One direction outside the old basis, and all of the new one along it."""
    old, new = torch.eye(3).double()[:, :1], torch.eye(3).double()[:, 1:2]
    gradient = torch.tensor([[0.0, 2.0, 0.0]]).double()
    after, _ = carried(gradient @ old, (gradient @ old).square(), old.T @ new)
    assert float((after - gradient @ new).norm()) == carried_mean_bound(old.T @ new, 2.0) == 2.0


def test_the_carried_variance_is_right_for_uncorrelated_coordinates():
    """Two-point values in every combination are uncorrelated exactly."""
    old, new = torch.eye(4).double()[:, :2], oracles.orthonormal(2, 2, generator())
    new = torch.cat([new, torch.zeros(2, 2, dtype=torch.float64)])
    points = [[0.3 + a, -0.1 + 2 * b, 0.0, 0.0] for a in (-1, 1) for b in (-1, 1)]
    gradients, weights = torch.tensor(points, dtype=torch.float64)[:, None], torch.full((4,), 0.25).double()
    found = carried(*moments(gradients, weights, old), old.T @ new)
    for ours, exact in zip(found, moments(gradients, weights, new)):
        assert torch.allclose(ours, exact)


def test_the_carried_variance_is_within_a_factor_of_the_columns():
    for seed in range(20):
        gradients, weights, old, new = history(seed, within=True)
        mean, second = moments(gradients, weights, old)
        change = old.T @ new
        after_mean, after = carried(mean, second, change)
        true_mean, true = moments(gradients, weights, new)
        spread = (second - mean.square()).clamp_min(0)
        most = carried_variance_bound(spread, change)
        assert bool((true - true_mean.square() <= most * SLACK + 1e-12).all())
        assert bool((most <= 3 * (after - after_mean.square()) * SLACK + 1e-12).all())
        assert bool((after_mean.abs() <= after.sqrt() * SLACK).all()), "a step is at most the rate in each coordinate"


@pytest.mark.parametrize("columns", [2, 3])
def test_correlated_coordinates_reach_that_factor(columns):
    """All coordinates move as one, along the new direction: the true variance is k times the carried one."""
    old = torch.eye(columns, dtype=torch.float64)
    new = torch.full((columns, 1), columns**-0.5, dtype=torch.float64)
    gradients = torch.tensor([-1.0, 1.0]).double()[:, None, None] * torch.ones(1, 1, columns).double()
    weights = torch.full((2,), 0.5).double()
    mean, second = moments(gradients, weights, old)
    _, after = carried(mean, second, new)
    _, true = moments(gradients, weights, new)
    assert float(true / after) == pytest.approx(columns)
    assert float(carried_variance_bound(second - mean.square(), new)) == pytest.approx(float(true))


def test_carrying_the_second_moment_whole_would_overshoot():
    """V C^2 without splitting off the mean: a constant gradient would move sqrt(k) times the rate."""
    mean, second = torch.ones(1, 4).double(), torch.ones(1, 4).double()
    change = torch.full((4, 1), 0.5, dtype=torch.float64)
    naive = (second @ change.square()).sqrt()
    assert float((mean @ change) / naive) == pytest.approx(2.0)
    first, after = carried(mean, second, change)
    assert float(first / after.sqrt()) == pytest.approx(1.0)
