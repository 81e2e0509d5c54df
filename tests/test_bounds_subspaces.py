"""Angles: perturbed matrices, warm starts on a matrix that stays and on one that drifts."""

import math

import numpy as np
import pytest
import torch

import oracles
from loract.bounds import largest_angle, misaligned_bound, rotation_bound, tracking_bound, warm_bound
from loract.rangefinder import Sampled

SLACK = 1 + 1e-7
TINY = 1e-7
"""An arcsine near 0 is known to the root of the rounding."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def leading(x, rank, side="right"):
    u, _, vt = np.linalg.svd(x.numpy(), full_matrices=False)
    return torch.from_numpy((vt[:rank].T if side == "right" else u[:, :rank]).copy())


def rotation(features, angle, generator):
    """An orthogonal matrix that turns every direction by at most `angle`: exp of a random skew matrix of that norm."""
    skew = torch.randn(features, features, dtype=torch.float64, generator=generator)
    skew = skew - skew.T
    return torch.matrix_exp(skew * angle / float(np.linalg.norm(skew.numpy(), 2)))


def test_angles_of_planes():
    e = torch.eye(4, dtype=torch.float64)
    tilted = torch.stack([e[0], math.cos(0.3) * e[1] + math.sin(0.3) * e[2]], 1)
    assert largest_angle(e[:, :2], tilted) == pytest.approx(0.3)
    assert largest_angle(e[:, :2], e[:, 2:]) == pytest.approx(math.pi / 2)
    assert largest_angle(e[:, 1:2], e[:, :3]) == 0.0


@pytest.mark.parametrize("kind", ["exponential", "fast"])
@pytest.mark.parametrize("size", [1e-3, 1e-2, 3e-2])
def test_singular_subspaces_turn_no_further_than_the_bound(kind, size):
    spectrum, claims = oracles.decaying(12, kind), 0
    for seed in range(40):
        g = generator(seed)
        x = oracles.prescribed(spectrum, 20, 12, g)
        change = torch.randn(20, 12, dtype=torch.float64, generator=g)
        change *= size / float(np.linalg.norm(change.numpy(), 2))
        bound = rotation_bound(float(spectrum[2]), float(spectrum[3]), size)
        claims += bound < math.pi / 2
        for side in ("left", "right"):
            assert largest_angle(leading(x, 3, side), leading(x + change, 3, side)) <= bound * SLACK + TINY
    assert claims in (0, 40)
    assert claims or size == 3e-2


@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_eigenvectors_turn_no_further_than_the_bound(size):
    for seed in range(40):
        g = generator(seed)
        v = oracles.orthonormal(10, 10, g)
        values = torch.linspace(2.0, 0.1, 10, dtype=torch.float64)
        change = torch.randn(10, 10, dtype=torch.float64, generator=g)
        change = change + change.T
        change *= size / float(np.linalg.norm(change.numpy(), 2))
        after = np.linalg.eigh(((v * values) @ v.T + change).numpy())[1][:, ::-1][:, :3].copy()
        bound = rotation_bound(float(values[2]), float(values[3]), size)
        assert largest_angle(v[:, :3], torch.from_numpy(after)) <= bound * SLACK + TINY


def test_the_rotation_bound_is_sharp():
    """A small change that mixes just the two directions at the gap."""
    x = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    change = 1e-3 * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    measured = largest_angle(leading(x, 1), leading(x + change, 1))
    assert 0.99 <= measured / rotation_bound(2.0, 1.0, 1e-3) <= SLACK


def test_no_claim_without_a_gap():
    assert rotation_bound(1.0, 1.0, 0.1) == rotation_bound(1.0, 0.8, 0.1) == math.pi / 2


@pytest.mark.parametrize("angle", [0.0, 0.1, 0.7])
def test_a_turned_basis_errs_no_more_than_the_bound(angle):
    spectrum = oracles.decaying(12, "fast")
    for seed in range(20):
        g = generator(seed)
        x = oracles.prescribed(spectrum, 20, 12, g)
        p = rotation(12, angle, g) @ leading(x, 3)
        error = float((x - x @ p @ p.T).norm())
        assert error <= misaligned_bound(spectrum, 3, largest_angle(leading(x, 3), p)) * SLACK
    x = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    p = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
    assert float((x - x @ p @ p.T).norm()) == pytest.approx(misaligned_bound(torch.tensor([2.0, 0.0]), 1, angle))


@pytest.mark.parametrize("columns", [3, 5])
def test_a_warm_start_contracts(columns):
    spectrum = oracles.decaying(12, "exponential")
    for seed in range(20):
        g = generator(seed)
        x = oracles.prescribed(spectrum, 20, 12, g)
        target, p = leading(x, 3), oracles.orthonormal(12, columns, g)
        for _ in range(6):
            expected = warm_bound(largest_angle(target, p), float(spectrum[3] / spectrum[2]))
            p = Sampled().basis(x, columns, g, start=p)
            assert largest_angle(target, p) <= expected * SLACK + TINY


def test_the_contraction_is_exact_in_the_plane():
    x = torch.diag(torch.tensor([1.0, 0.6], dtype=torch.float64))
    for angle in (0.1, 1.0, 1.5):
        p = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
        after = Sampled().basis(torch.cat([x, x]), 1, generator(), start=p)
        assert largest_angle(torch.eye(2).double()[:, :1], after) == pytest.approx(warm_bound(angle, 0.6), rel=1e-6)


@pytest.mark.parametrize("drift", [0.02, 0.1])
def test_warm_starts_follow_a_drifting_matrix(drift):
    spectrum = oracles.decaying(12, "exponential")
    ratio, settled = float(spectrum[3] / spectrum[2]), []
    for seed in range(10):
        g = generator(seed)
        x = oracles.prescribed(spectrum, 20, 12, g)
        p = leading(x, 3)
        for _ in range(25):
            before = leading(x, 3)
            x = x @ rotation(12, drift, g)
            now = leading(x, 3)
            turn = largest_angle(now, before)
            assert turn <= drift * SLACK
            allowed = warm_bound(largest_angle(before, p), ratio, turn)
            p = Sampled().basis(x, 3, g, start=p)
            assert largest_angle(now, p) <= allowed * SLACK + TINY
            assert largest_angle(now, p) <= tracking_bound(ratio, drift) * SLACK + TINY
        settled.append(largest_angle(now, p))
    assert tracking_bound(ratio, drift) < 14 * np.median(settled)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
def test_tracking_is_exact_under_a_steady_turn_in_the_plane(ratio):
    drift = 0.04
    p = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    for step in range(1, 200):
        c, s = math.cos(step * drift), math.sin(step * drift)
        turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        x = torch.diag(torch.tensor([1.0, ratio], dtype=torch.float64)) @ turn.T
        y = x.T @ (x @ p)
        p = y / y.norm()
    assert largest_angle(turn[:, :1], p) == pytest.approx(tracking_bound(ratio, drift), rel=1e-6)


def test_a_drift_beyond_the_limit_may_lose_track():
    ratio = 0.9
    limit = math.atan((1 - ratio**2) / (2 * ratio))
    assert tracking_bound(ratio, limit * 1.001) == math.pi / 2
    assert tracking_bound(ratio, limit * 0.999) < math.pi / 4 + 0.1
    angle = 0.0
    for _ in range(400):
        angle = warm_bound(angle, ratio, limit * 1.05)
    assert angle == math.pi / 2
