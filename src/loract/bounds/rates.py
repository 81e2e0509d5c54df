"""Rate-distortion of Gaussian data: what any code must lose, and transform coding against low rank at equal bytes.

Proofs: docs/theory/rates.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from loract.errors import InvalidSpec


def water_filling(variances: Tensor, bits: float) -> tuple[Tensor, float]:
    """Bits of each component (k,), `bits` a component on average, and the predicted relative squared error.

    b_j = max(0, log2(sigma_j^2 / theta) / 2) minimises sum_j sigma_j^2 4^(-b_j) at this rate, so that every component
    with bits errs by the same theta: reverse water-filling, Cover & Thomas 2006, theorem 10.3.3 (parallel Gaussian
    source). Its square root is the relative Frobenius error. See `rate_distortion` for who can reach it.

    Raises:
        InvalidSpec: bits below 0, variances that are not a finite non-negative vector, or all zero.

    Example:
        >>> water_filling(torch.tensor([16.0, 4.0, 0.25]), 1.0)
        (tensor([2., 1., 0.], dtype=torch.float64), 0.1111111111111111)
    """
    allotted, theta = _filled(variances, bits)
    wide = variances.double()
    return allotted, float(wide.clamp_max(theta).sum() / wide.sum())


def rate_distortion(variances: Tensor, bits: float) -> float:
    """D(R) = sum_j min(theta, sigma_j^2) at R = `bits` a component: least squared error of any code, per vector.

    For independent Gaussian components, in the variances' units (Cover & Thomas 2006, theorem 10.3.3); for other
    sources of these variances an upper bound on their own D(R) (Shannon; Berger 1971). It is a limit for long blocks.
    A uniform quantiser with ideal entropy coding comes within pi e / 6 = 1.53 dB of it at high rates (Gish & Pierce
    1968); with codes of a fixed length, as here, the gap on Gaussian data grows with the rate: factors 1.45, 1.90, 2.95
    and 5.7 at 1, 2, 4 and 8 bits, without rounding of bits to whole numbers.

    Raises:
        InvalidSpec: as `water_filling`.

    Example:
        >>> rate_distortion(torch.tensor([16.0, 4.0, 0.25]), 1.0)
        2.25
    """
    _, theta = _filled(variances, bits)
    return float(variances.double().clamp_max(theta).sum())


def _filled(variances: Tensor, bits: float) -> tuple[Tensor, float]:
    """Bits (k,) and the water level theta."""
    wide = variances.detach().double()
    if wide.dim() != 1 or not bool((torch.isfinite(wide) & (wide >= 0)).all()) or not bool((wide > 0).any()):
        raise InvalidSpec(
            "variances", "a vector of finite variances, one above 0", "pass the squares of singular values"
        )
    if not 0 <= bits < math.inf:
        raise InvalidSpec(f"bits={bits!r}", "a number of bits a component, at least 0", "use bits=2.0")
    logs = wide[wide > 0].sort(descending=True).values.log2()
    # With m components above water: log2 theta = mean of their log2 variances - 2 (total bits) / m.
    levels = (logs.cumsum(0) - 2 * bits * len(wide)) / torch.arange(1, len(logs) + 1)
    level = levels[max(int((levels < logs).sum()) - 1, 0)]
    return ((wide.log2() - level) / 2).clamp_min(0), float(level.exp2())


class EqualBytes(NamedTuple):
    """Relative errors (Frobenius) at the same bytes, and how many components transform coding keeps."""

    low_rank: float
    transform: float
    components: int


def equal_bytes(
    variances: Tensor, tokens: int, rank: int, *, bits: float = 16.0, basis_bits: float = 8.0
) -> EqualBytes:
    """Low rank with factors of `bits` against ideal transform coding, variances (n,) of the components, N tokens.

    Low rank keeps k = `rank` of them, exactly (its rounding is not counted), for k (N + n) numbers of `bits`. With the
    same bits transform coding keeps m components, whose basis takes m n numbers of basis_bits and whose coefficients
    share the rest by reverse water-filling; m is the best one. It is ideal: a code at the rate-distortion limit, a
    basis without error (see `rate_distortion` for what codes of a fixed length add). Where the spectrum ends at k, low
    rank is exact here, and nothing that spends bits on rounding can follow.

    Raises:
        InvalidSpec: variances as `water_filling` takes them, or a rank that they do not have.

    Example:
        >>> found = equal_bytes(1 / torch.arange(1, 65) ** 2, tokens=512, rank=8)
        >>> round(found.low_rank, 3), round(found.transform, 3), found.components
        (0.25, 0.09, 44)
    """
    _filled(variances, 0.0)
    features = len(variances)
    if not 1 <= rank <= features:
        raise InvalidSpec(f"rank={rank!r} for {features} variances", f"1 to {features}", "pass a smaller rank")
    sorted_ = variances.detach().double().sort(descending=True).values
    total = float(sorted_.sum())
    left = torch.cat([sorted_.flip(0).cumsum(0).flip(0), sorted_.new_zeros(1)])
    budget = rank * bits * (1 + features / tokens)
    best, components = total, 0
    for kept in range(1, int((sorted_ > 0).sum()) + 1):
        rate = budget - kept * features * basis_bits / tokens
        if rate < 0:
            break
        lost = rate_distortion(sorted_[:kept], rate / kept) + float(left[kept])
        if lost < best:
            best, components = lost, kept
    return EqualBytes(math.sqrt(float(left[rank]) / total), math.sqrt(best / total), components)


def decay_gain(decay: float, bits: float) -> float:
    """Squared error of transform coding over low rank's, for variances j^-a: a (2 b ln 2 / a)^(1 - a).

    a = `decay` > 1; both spend k b bits a token, bases not counted. The limit of large k and n / k.

    Example:
        >>> round(decay_gain(2.0, 16), 3), round(decay_gain(1.25, 16), 3)
        (0.18, 0.609)
    """
    return decay * (2 * bits * math.log(2) / decay) ** (1 - decay)
