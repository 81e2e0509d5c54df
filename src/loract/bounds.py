"""Error bounds of the sampled decomposition: a priori by theorem, a posteriori by norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loract.linalg import promote


def coherence(u: Tensor) -> float:
    """Mu = (m / k) max_i ||u_i||^2 of orthonormal columns u (m, k): 1 when spread evenly, m / k at worst.

    Example:
        >>> coherence(torch.eye(4)[:, :2])
        2.0
    """
    rows, rank = u.shape
    return float(rows / rank * promote(u).square().sum(1).max())


def sampled_bound(sigma_next: float, rows: int, samples: int, epsilon: float) -> float:
    """(1 + m / ((1 - e) l))^(1/4) sigma_(k+1): spectral error of sampling l of m rows uniformly.

    With Y = A A_S^T and Omega = V_k^T E_S, Halko, Martinsson & Tropp 2011 (theorem 9.1 applied to A A^T) give
    ||A - QB||^2 <= sigma_(k+1)^2 sqrt(1 + ||Omega^+||^2), and sigma_min(Omega)^2 >= (1 - e) l / m except with
    `failure_probability`. l counts the samples that are kept.
    """
    return (1 + rows / ((1 - epsilon) * samples)) ** 0.25 * sigma_next


def failure_probability(rank: int, samples: int, coherence: float, epsilon: float) -> float:
    """K (exp(-e) / (1 - e)^(1 - e))^(l / (mu k)), at most 1.

    The matrix Chernoff bound (Tropp 2012, theorem 1.1), which holds without replacement too (Gross & Nesme 2010).
    """
    exponent = samples / (coherence * rank) * (-epsilon - (1 - epsilon) * math.log(1 - epsilon))
    return min(1.0, rank * math.exp(exponent))


def posterior_floor(dtype: torch.dtype) -> float:
    """Relative error below which `posterior_error` cancels: 1e-2 for fp32, 5e-2 for 16-bit factors, 1e-6 for fp64."""
    return {torch.float64: 1e-6, torch.float32: 1e-2}.get(dtype, 5e-2)


def posterior_error(total_squared: Tensor, captured_squared: Tensor) -> Tensor:
    """sqrt(1 - ||C||^2 / ||X||^2), the relative error of X ~ C P^T with P orthonormal and C = X P.

    Pythagoras: ||X - C P^T||^2 = ||X||^2 - ||C||^2. Valid above `posterior_floor`. Zero for X = 0; NaN stays NaN.
    """
    tiny = torch.finfo(total_squared.dtype).tiny
    missing = 1 - captured_squared.to(total_squared.dtype) / total_squared.clamp_min(tiny)
    return torch.where(total_squared == 0, torch.zeros_like(missing), missing.clamp_min(0)).sqrt()
