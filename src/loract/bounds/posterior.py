"""The error of a projection, told from norms: an identity, and the rounding that it does not survive.

Proofs: docs/theory/posterior.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def posterior_interval(estimate: float, *, basis: float, product: float, sums: float = 0.0) -> tuple[float, float]:
    """Where the true relative error ||X - C P^T|| / ||X|| lies, given `posterior_error`'s estimate and its rounding.

    `basis` = ||P^T P - I||_2, `product` = ||C - X P||_F / ||X||_F, `sums` = relative error of each of the two squared
    norms. With c^2 = 1 - estimate^2 the squares differ by at most 2 product c + basis c^2 (and what sums add), so that
    an estimate below the root of that says nothing.

    Example:
        >>> low, high = posterior_interval(0.1, basis=1e-3, product=1e-3)
        >>> round(low, 3), round(high, 3)
        (0.084, 0.114)
        >>> posterior_interval(0.1, basis=0.0, product=0.01)[0]
        0.0
    """
    captured = max(0.0, 1 - estimate**2)
    most = captured * (1 + sums) / (1 - sums)
    slack = captured * 2 * sums / (1 - sums) + 2 * product * math.sqrt(most) + basis * most
    return math.sqrt(max(0.0, estimate**2 - slack)), math.sqrt(estimate**2 + slack)
