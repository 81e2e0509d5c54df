"""What an error of the gradient costs in convergence: biased, unbiased, projected; f has L-Lipschitz gradients.

Proofs and equality cases: docs/theory/descent.md. g is the exact gradient, g' the one that is used.
"""

from __future__ import annotations

import math

from torch import Tensor

from loract.errors import InvalidSpec
from loract.linalg import singular_values


def progress(error: float) -> float:
    """1 - e^2: share of the guaranteed decrease ||g||^2 / (2 L) that is left if ||g' - g|| <= e ||g||.

    At steps of 1 / L, for 0 <= e < 1; no other step guarantees more. A gap f - f* that shrinks by 1 - m / L a step
    (Polyak-Lojasiewicz constant m) shrinks by 1 - (m / L) (1 - e^2). Nothing is guaranteed at e >= 1: 0.

    Example:
        >>> progress(0.1), progress(1.0)
        (0.99, 0.0)
    """
    return max(0.0, 1 - error**2)


def progress_of_cosine(cosine: float) -> float:
    """C^2: the same share for g' of any length, at the best step <g, g'> / (L ||g'||^2); 0 for a cosine below 0.

    Example:
        >>> progress_of_cosine(0.5)
        0.25
    """
    return max(0.0, cosine) ** 2


def progress_unbiased(variance: float) -> float:
    """1 / (1 + v): the same share in the mean, for E g' = g and E ||g' - g||^2 <= v ||g||^2.

    At steps of 1 / (L (1 + v)). Beats `progress` at the same error, and needs no v < 1. But stochastic rounding errs
    more than rounding to nearest (twice in the mean square, where values lie evenly between levels), and
    1 / (1 + 2 e^2) > 1 - e^2 only for e^2 > 1/2.

    Example:
        >>> progress_unbiased(0.25)
        0.8
    """
    return 1 / (1 + variance)


def stationarity(gap: float, smoothness: float, steps: int, *, error: float = 0.0, absolute: float = 0.0) -> float:
    """Bound on min_t ||g_t||^2 after T = `steps` steps of 1 / L, where ||g' - g||^2 <= e^2 ||g||^2 + a^2.

    2 L (f_0 - f*) / (T (1 - e^2)) + a^2 / (1 - e^2): an error that does not fall with the gradient, a = `absolute`,
    leaves a floor that no number of steps and no smaller step goes below.

    Raises:
        InvalidSpec: a relative error of 1 or more.

    Example:
        >>> stationarity(1.0, 1.0, 100)
        0.02
    """
    if not 0 <= error < 1:
        raise InvalidSpec(f"error={error!r}", "a relative error in [0, 1)", "nothing is guaranteed above")
    return (2 * smoothness * gap / steps + absolute**2) / (1 - error**2)


def stationarity_unbiased(gap: float, smoothness: float, steps: int, *, rate: float, variance: float) -> float:
    """Bound on the mean of ||g_t||^2 for E g' = g, E ||g' - g||^2 <= a^2 = `variance`, at steps of h = `rate` <= 1 / L.

    2 (f_0 - f*) / (T h) + L h a^2: here the floor falls with the step, which is what stochastic rounding buys.

    Raises:
        InvalidSpec: a rate above 1 / L.

    Example:
        >>> stationarity_unbiased(1.0, 1.0, 100, rate=0.1, variance=1.0)
        0.30000000000000004
    """
    if not 0 < rate * smoothness <= 1:
        raise InvalidSpec(f"rate={rate!r}", f"in (0, {1 / smoothness:g}], at most 1 / smoothness", "lower the rate")
    return 2 * gap / (steps * rate) + smoothness * rate * variance


def captured_share(gradient: Tensor, basis: Tensor) -> float:
    """||G P||_F^2 / ||G||_F^2, gradient (m, n), P (n, k): a projected step's share of the guaranteed decrease.

    The step -G P P^T / L has e^2 = 1 - share, and `progress` is the share itself. A random P has k / n in the mean.

    Example:
        >>> import torch
        >>> captured_share(torch.eye(4), torch.eye(4)[:, :1])
        0.25
    """
    g = gradient.double()
    return float((g @ basis.double()).square().sum() / g.square().sum())


def stale_share(share: float, gradient_norm: float, moved: float, smoothness: float) -> float:
    """Least `captured_share` of a basis found at a gradient of this norm, after the weights have moved so far.

    1 - ((sqrt(1 - c) ||g|| + L d) / (||g|| - L d))^2 and at least 0, since g has turned by at most L d.

    Example:
        >>> round(stale_share(0.9, 1.0, 0.01, 1.0), 3)
        0.891
    """
    drift = smoothness * moved
    if drift >= gradient_norm:
        return 0.0
    lost = (math.sqrt(max(0.0, 1 - share)) * gradient_norm + drift) / (gradient_norm - drift)
    return max(0.0, 1 - lost**2)


def carried_mean_bound(change: Tensor, outside: float) -> float:
    """Error (Frobenius) of a first moment carried as M C, C = P_old^T P_new (k, k'), against that of all gradients.

    sin(angle) times `outside` = ||(sum_t w_t G_t) (I - P_old P_old^T)||_F, for the angle from P_new to P_old: what the
    old basis did not see cannot be carried. `change` is C; sin^2 = 1 - sigma_min(C)^2.

    Example:
        >>> import torch
        >>> carried_mean_bound(torch.eye(2), 3.0), carried_mean_bound(torch.zeros(2, 2), 3.0)
        (0.0, 3.0)
    """
    values = singular_values(change.double())
    least = float(values[-1]) if change.shape[1] <= change.shape[0] else 0.0
    return math.sqrt(max(0.0, 1 - least**2)) * outside


def carried_variance_bound(spread: Tensor, change: Tensor) -> Tensor:
    """Most that a second central moment can be after a change of basis: (sqrt(V) |C|)^2, spread V (m, k), C (k, k').

    The carried one is V C^2, exact for uncorrelated coordinates; the true one lies between 0 and this, which is at most
    k times the carried one and reached where coordinates are fully correlated.

    Example:
        >>> import torch
        >>> carried_variance_bound(torch.ones(1, 2), torch.full((2, 1), 0.5**0.5)).round(decimals=6)
        tensor([[2.]], dtype=torch.float64)
    """
    return (spread.double().sqrt() @ change.double().abs()).square()
