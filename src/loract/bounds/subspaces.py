"""Angles between subspaces: how far singular vectors turn when a matrix changes, and how well warm starts follow.

Source: Wedin 1972, Davis & Kahan 1970; subspace iteration as in Golub & Van Loan 2013, 8.2.4. Proofs:
docs/theory/subspaces.md. Angles are in radians, from 0 to pi / 2.
"""

from __future__ import annotations

import math

from torch import Tensor

from loract.linalg import singular_values


def largest_angle(v: Tensor, p: Tensor) -> float:
    """Largest principal angle between range(v) and range(p), v (n, k) and p (n, l) orthonormal, k <= l: radians.

    arcsin ||(I - P P^T) V||_2: no direction of V is further from P. 0 where P contains V.

    Example:
        >>> import torch
        >>> largest_angle(torch.eye(3)[:, :1], torch.eye(3)[:, :2])
        0.0
    """
    v, p = v.double(), p.double()
    return math.asin(min(1.0, float(singular_values(v - p @ (p.T @ v))[0])))


def rotation_bound(value: float, following: float, change: float) -> float:
    """arcsin(d / (s_k - s_(k+1) - d)): how far the leading k singular subspaces turn when X changes by ||E||_2 = d.

    Left and right (Wedin). The same formula holds for eigenvalues of a symmetric matrix (Davis & Kahan). pi / 2, which
    says nothing, where d is half of the gap or more.

    Example:
        >>> round(rotation_bound(2.0, 1.0, 0.1), 4)
        0.1113
    """
    gap = value - following - change
    return math.pi / 2 if gap <= change else math.asin(change / gap)


def misaligned_bound(spectrum: Tensor, rank: int, angle: float) -> float:
    """sqrt(sin^2 ||Sigma_1||_F^2 + ||Sigma_2||_F^2) >= ||X - X P P^T||_F for P at this angle from V_k, in X's units.

    Example:
        >>> import torch
        >>> misaligned_bound(torch.tensor([3.0, 1.0]), 1, 0.0)
        1.0
    """
    energies = spectrum.double().square()
    return math.sqrt(math.sin(angle) ** 2 * float(energies[:rank].sum()) + float(energies[rank:].sum()))


def warm_bound(angle: float, ratio: float, drift: float = 0.0) -> float:
    """Angle after one step of P' = orth(X^T X P): arctan(rho^2 tan(angle + drift)), radians.

    `angle` from P to the leading subspace of the last step's X, `drift` that subspace's turn since then (see
    `rotation_bound`), rho = sigma_(k+1) / sigma_k of the present X. pi / 2 where angle + drift reach it.

    Example:
        >>> round(math.tan(warm_bound(math.pi / 4, 0.5)), 4)
        0.25
    """
    turned = angle + drift
    return math.pi / 2 if turned >= math.pi / 2 else math.atan(ratio**2 * math.tan(turned))


def tracking_bound(ratio: float, drift: float) -> float:
    """Angle at which warm starts settle under a drift of so many radians a step; pi / 2 where they may lose track.

    With r = rho^2 and t = tan(drift) its tangent is ((1 - r) - sqrt((1 - r)^2 - 4 r t^2)) / (2 t), near r t / (1 - r).
    It is kept once reached from below, for tan drift <= (1 - rho^2) / (2 rho).

    Example:
        >>> round(tracking_bound(0.5, 0.03), 4)
        0.01
    """
    if drift == 0 or ratio == 0:
        return 0.0
    gain, turn = 1 - ratio**2, math.tan(drift)
    inside = gain**2 - 4 * ratio**2 * turn**2
    if inside < 0 or drift >= math.pi / 2:
        return math.pi / 2
    return math.atan(2 * ratio**2 * turn / (gain + math.sqrt(inside)))
