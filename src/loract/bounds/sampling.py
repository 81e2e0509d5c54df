"""Errors of X ~ (X P) P^T with P from a sketch Y = X^T Omega: any test matrix, a Gaussian one, a sample of X itself.

Source: Halko, Martinsson & Tropp 2011 (HMT), theorems 9.1 and 10.5. Proofs, and what each bound cannot say:
docs/theory/sampling.md. Spectra are singular values in descending order; errors are in X's units.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from loract.errors import InvalidSpec
from loract.linalg import promote, singular_values, singular_vectors


def coherence(u: Tensor) -> float:
    """Mu = (m / k) max_i ||u_i||^2 of orthonormal columns u (m, k): 1 when spread evenly, m / k at worst.

    Example:
        >>> coherence(torch.eye(4)[:, :2])
        2.0
    """
    rows, rank = u.shape
    return float(rows / rank * promote(u).square().sum(1).max())


def numerical_rank(x: Tensor) -> int:
    """Singular values of x (N, n) above max(N, n) eps ||x||_2.

    The sampled decomposition reproduces X exactly if and only if the ranks of X_S and X are equal.

    Example:
        >>> x = torch.ones(4, 1) @ torch.ones(1, 3)
        >>> numerical_rank(x), numerical_rank(x[:, :1])
        (1, 1)
    """
    values = singular_values(x)
    return int((values > max(x.shape) * torch.finfo(values.dtype).eps * values[0]).sum())


class SketchBound(NamedTuple):
    """Bounds on ||X - (X P) P^T||, in X's units; infinite where the sketch misses a leading direction."""

    spectral: float
    """In the spectral norm, P spanning all l columns of the sketch."""
    frobenius: float
    """In the Frobenius norm, also where the best k of l columns are kept."""
    truncated: float
    """In the spectral norm where the best k of l columns are kept."""


def sketch_bound(x: Tensor, test: Tensor, rank: int) -> SketchBound:
    """Bounds for P from Y = X^T Omega, x (N, n), test = Omega (N, l) of any origin, l >= k = `rank`.

    With Omega_i = U_i^T Omega (leading k left singular vectors, and the rest) and T = Omega_2 Omega_1^+:
    ||X - X P P^T||_F^2 <= ||Sigma_2||_F^2 + ||Sigma_2 T||_F^2, and in the spectral norm at most
    ||Sigma_2 (I + T T^T) Sigma_2||, which HMT's theorem 9.1 bounds in turn by ||Sigma_2||^2 + ||Sigma_2 T||^2.
    Sampled features S: Omega = X_S, so that T carries one more factor Sigma_2 / Sigma_1, half a power iteration.
    Sampled tokens: Omega = unit vectors. q power iterations: Omega becomes (X X^T)^q Omega.

    Raises:
        InvalidSpec: a rank of no column, or of more than the sketch has.

    Example:
        >>> x = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> found = sketch_bound(x, torch.tensor([[1.0], [1.0], [0.0]]), 1)
        >>> round(found.spectral**2, 4), round(found.frobenius**2, 4)
        (8.0, 9.0)
    """
    if not 1 <= rank <= min(test.shape[1], *x.shape):
        got = f"rank={rank!r} for x {tuple(x.shape)} and a test matrix {tuple(test.shape)}"
        raise InvalidSpec(got, "from 1 to the sketch's columns", "pass a smaller rank or a wider sketch")
    u, spectrum, _ = singular_vectors(x.double())
    tail = spectrum[rank:]
    projected = u.T @ test.double()  # what Omega has outside the range of X meets zeros
    first, rest = projected[:rank], projected[rank:]
    a, values, b = singular_vectors(first)
    if float(values[-1]) <= max(first.shape) * torch.finfo(values.dtype).eps * float(test.double().norm()):
        return SketchBound(math.inf, math.inf, math.inf)
    missed = tail[:, None] * (rest @ (b / values) @ a.T)
    spectral = float(singular_values(torch.cat([torch.diag(tail), missed], 1))[0]) if len(tail) else 0.0
    frobenius = math.sqrt(float(tail.square().sum() + missed.square().sum()))
    return SketchBound(spectral, frobenius, math.hypot(spectral, float(tail[0]) if len(tail) else 0.0))


def gaussian_bound(spectrum: Tensor, rank: int, oversample: int, exponent: int = 1) -> float:
    """Root of the mean of ||X - X P P^T||_F^2 is at most this, for Y = V Sigma^a G, G (n, k + p) Gaussian.

    Squared: sum_(j > k) s_j^2 + sum_(j > k) s_j^(2a) sum_(i <= k) s_i^(2 - 2a) / (p - 1). a = `exponent`: 1 is
    randomised SVD (HMT theorem 10.5), 1 + 2 q after q power iterations, 2 the sampled decomposition of an X whose right
    singular vectors have no preferred direction (Haar): half a power iteration, and never more than randomised SVD.

    Raises:
        InvalidSpec: p = `oversample` below 2, a rank of no column or whose singular value is 0, an exponent below 1.

    Example:
        >>> spectrum = torch.tensor([1.0, 1.0, 0.5, 0.5])
        >>> round(gaussian_bound(spectrum, 2, 3), 4), round(gaussian_bound(spectrum, 2, 3, exponent=2), 4)
        (1.0, 0.7906)
    """
    if oversample < 2 or exponent < 1 or not 1 <= rank <= len(spectrum) or float(spectrum[rank - 1]) <= 0:
        got = f"rank={rank!r}, oversample={oversample!r}, exponent={exponent!r} for {len(spectrum)} singular values"
        raise InvalidSpec(got, "p >= 2, a >= 1 and k positive singular values", "lower rank, or raise oversample")
    wide = spectrum.double()
    head, tail = wide[:rank], wide[rank:]
    excess = tail.pow(2 * exponent).sum() * head.pow(2 - 2 * exponent).sum() / (oversample - 1)
    return math.sqrt(float(tail.square().sum() + excess))


def sampled_bound(sigma_next: float, rows: int, samples: int, epsilon: float, sigma: float = 0.0) -> float:
    """Spectral error of sampling l of m rows uniformly, except with `failure_probability`.

    (m / ((1 - e) l))^(1/4) sigma_(k+1); given `sigma` = sigma_k also sigma_(k+1) sqrt(1 + rho^2 (m / ((1 - e) l) - 1)),
    rho = sigma_(k+1) / sigma_k, where that is less. For Y = A A_S^T, A (m, columns), mu the coherence of its leading k
    left singular vectors. l counts the samples that are kept; P spans all of them. For every sample, in terms of its
    own smallest singular value, see `sketch_bound`.

    Example:
        >>> round(sampled_bound(1.0, 640, 80, 0.5), 3), round(sampled_bound(1.0, 640, 80, 0.5, sigma=4.0), 3)
        (2.0, 1.392)
    """
    spread = rows / ((1 - epsilon) * samples)
    flat = spread**0.25
    if sigma <= 0:
        return flat * sigma_next
    return min(flat, math.sqrt(1 + (sigma_next / sigma) ** 2 * (spread - 1))) * sigma_next


def failure_probability(rank: int, samples: int, coherence: float, epsilon: float) -> float:
    """K (exp(-e) / (1 - e)^(1 - e))^(l / (mu k)), at most 1: how often `sampled_bound` may fail.

    A matrix Chernoff bound (Tropp 2012, theorem 1.1), which holds without replacement too (Gross & Nesme 2010). At
    e = 1 it is k exp(-l / (mu k)): how often a matrix of rank k is not recovered exactly.

    Example:
        >>> round(failure_probability(4, 80, 2.0, 1.0), 6)
        0.000182
    """
    kept = 0.0 if epsilon == 1 else (1 - epsilon) * math.log(1 - epsilon)
    return min(1.0, rank * math.exp(samples / (coherence * rank) * (-epsilon - kept)))


def sampled_floor(features: int, samples: int) -> float:
    """sqrt((1 + c) / (2 c)), c = sqrt(l / n): a factor on sigma_(k+1) that every bound for uniform sampling must allow.

    There is an X (k = 1, mu = 1, sigma_1^2 = sigma_2^2 (1 + 1 / c), all others equal) with exactly this spectral error
    for every sample of l of n features. It grows as (n / (4 l))^(1/4), while mu k / l stays: no bound of the form
    (1 + C sqrt(mu k / l)) sigma_(k+1) has an absolute constant C. `sampled_bound` is within sqrt(2) of it at e = 0.

    Example:
        >>> round(sampled_floor(16, 4), 4), round(sampled_floor(1600, 4), 4)
        (1.2247, 3.2404)
    """
    share = math.sqrt(samples / features)
    return math.sqrt((1 + share) / (2 * share))


def missed_probability(share: float, samples: int) -> float:
    """(1 - q)^l bounds how often a feature with the share q of the energy is not among l drawn by squared norm.

    Uniform sampling misses it with probability 1 - l / n, however large it is; and the error is then at least the
    feature's norm, if it is orthogonal to the others.

    Example:
        >>> round(missed_probability(0.25, 16), 4)
        0.01
    """
    return (1 - share) ** samples
