"""Range finders: an orthonormal basis P (n, k) of the feature side with X ~ (X P) P^T.

`Sampled` is LoRAct's sampling-based orthogonal decomposition (Shi et al. 2025, arXiv:2509.23472), `Gaussian` the
randomised SVD of Halko, Martinsson & Tropp 2011, `Truncated` the optimum (Eckart-Young), kept as an oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from loract.errors import InvalidSpec
from loract.linalg import gram, leading_eigenvectors, orthonormalise, promote, row_energies


def resolve_rank(rank: int | float, features: int) -> int:
    """Columns meant by `rank` for n = `features`: int = columns, float in (0, 1] = share of n.

    Raises:
        InvalidSpec: a bool, a rank below 1 or above n, or a ratio that rounds to zero.

    Example:
        >>> resolve_rank(0.125, 640), resolve_rank(1, 640), resolve_rank(1.0, 640)
        (80, 1, 640)
    """
    expected = "an int from 1 to the number of features, or a float in (0, 1]"
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise InvalidSpec(f"rank={rank!r}", expected, "pass rank=0.125 for an eighth of the features")
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise InvalidSpec(f"rank={rank!r}", expected, "pass a ratio such as 0.125, or an int for columns")
        columns = round(rank * features)
        if columns == 0:
            raise InvalidSpec(
                f"rank={rank!r}, which rounds to 0 of {features} features", expected, f"use at least {1 / features:.2g}"
            )
        return columns
    if not 1 <= rank <= features:
        raise InvalidSpec(f"rank={rank!r} for {features} features", expected, f"use 1 to {features}, or a ratio")
    return rank


@runtime_checkable
class RangeFinder(Protocol):
    """Finds the basis. Implementations are frozen dataclasses; randomness is an argument."""

    def basis(
        self,
        x: Tensor,
        rank: int,
        generator: torch.Generator,
        *,
        start: Tensor | None = None,
        energies: Tensor | None = None,
    ) -> Tensor:
        """P (n, k), k = min(rank, N, n), in fp32 or wider, for x (N, n).

        `start` (n, l) is a warm start; `energies` (N,) are the tokens' squared norms, where they are known.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """LoRAct's decomposition: the test matrix is a sample of the data itself.

    `sample="features"`: draw l = k + oversample columns S, Y = X^T X_S (columns of the Gram matrix): no random
    matrix, and half a power iteration for free, since Y carries squared singular values. `"tokens"`: Y = X_S^T,
    sampled rows, which costs no product at all. `weights="norm2"` draws in proportion to squared norms (Gumbel
    top-k), which outlier channels need; the a-priori bound (`bounds.sampled_bound`) is for "uniform" features.
    `oversample`: int = columns, float = share of k. `power` more iterations follow, each re-orthonormalised. Of l
    columns the best k are kept. The sketch reads at most `max_tokens` tokens, drawn by the same weights (None: all);
    the coefficients always read every token.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(50, 3, generator=g) @ torch.randn(3, 20, generator=g)
        >>> p = Sampled().basis(x, 3, g)
        >>> bool(((x @ p) @ p.T - x).norm() < 1e-3 * x.norm())
        True
    """

    sample: Literal["features", "tokens"] = "features"
    weights: Literal["uniform", "norm2"] = "norm2"
    oversample: int | float = 0.25
    power: int = 0
    max_tokens: int | None = 1024

    def __post_init__(self) -> None:
        """Validate the configuration.

        Raises:
            InvalidSpec: an unknown sample or weights, or a negative count.
        """
        if self.sample not in ("features", "tokens"):
            raise InvalidSpec(f"sample={self.sample!r}", '"features" or "tokens"', 'use sample="features"')
        if self.weights not in ("uniform", "norm2"):
            raise InvalidSpec(f"weights={self.weights!r}", '"uniform" or "norm2"', 'use weights="norm2"')
        _check_counts(self.oversample, self.power)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidSpec(f"max_tokens={self.max_tokens!r}", "at least 1, or None", "use max_tokens=None")

    def basis(
        self,
        x: Tensor,
        rank: int,
        generator: torch.Generator,
        *,
        start: Tensor | None = None,
        energies: Tensor | None = None,
    ) -> Tensor:
        """P (n, k) for x (N, n)."""
        if (whole := _whole(x, rank)) is not None:
            return whole
        count = min(rank + _extra(self.oversample, rank), *x.shape)
        if self.max_tokens is not None and len(x) > (limit := max(self.max_tokens, count)):
            if self.weights == "uniform":
                energies = None
            elif energies is None:
                energies = row_energies(x)
            x = x[_draw(energies, len(x), limit, generator, x.device)]
        wide = promote(x)
        if start is not None:
            y = wide.T @ (wide @ start.to(wide.dtype))
        elif self.sample == "features":
            columns = wide.square().sum(0) if self.weights == "norm2" else None
            y = wide.T @ wide[:, _draw(columns, x.shape[1], count, generator, x.device)]
        else:
            rows = wide.square().sum(1) if self.weights == "norm2" else None
            y = wide[_draw(rows, x.shape[0], count, generator, x.device)].T
        return _refine(wide, y, min(rank, *x.shape), self.power)


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Randomised SVD: Y = X^T G with Gaussian G (N, k + oversample) (Halko, Martinsson & Tropp 2011, alg. 4.1)."""

    oversample: int | float = 8
    power: int = 0

    def __post_init__(self) -> None:
        """Validate the configuration.

        Raises:
            InvalidSpec: a negative count.
        """
        _check_counts(self.oversample, self.power)

    def basis(
        self,
        x: Tensor,
        rank: int,
        generator: torch.Generator,
        *,
        start: Tensor | None = None,
        energies: Tensor | None = None,
    ) -> Tensor:
        """P (n, k) for x (N, n)."""
        if (whole := _whole(x, rank)) is not None:
            return whole
        wide = promote(x)
        count = min(rank + _extra(self.oversample, rank), *x.shape)
        if start is not None:
            y = wide.T @ (wide @ start.to(wide.dtype))
        else:
            y = wide.T @ torch.randn(len(x), count, dtype=wide.dtype, device=x.device, generator=generator)
        return _refine(wide, y, min(rank, *x.shape), self.power)


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """The optimum: leading right singular vectors, through the n x n Gram matrix in fp64. An oracle, not a method."""

    def basis(
        self,
        x: Tensor,
        rank: int,
        generator: torch.Generator,
        *,
        start: Tensor | None = None,
        energies: Tensor | None = None,
    ) -> Tensor:
        """P (n, k) for x (N, n)."""
        wide = x.double()
        return leading_eigenvectors(gram(wide, wide), min(rank, *x.shape)).to(promote(x[:0]).dtype)


def _check_counts(oversample: int | float, power: int) -> None:
    if oversample < 0 or power < 0:
        raise InvalidSpec(f"oversample={oversample}, power={power}", "at least 0", "use oversample=8, power=0")


def _extra(oversample: int | float, rank: int) -> int:
    return round(oversample * rank) if isinstance(oversample, float) else oversample


def _whole(x: Tensor, rank: int) -> Tensor | None:
    """An exact basis where no sketch is needed: a sketch squares the spectrum and would lose its small end."""
    tokens, features = x.shape
    if rank >= features and features <= tokens:
        return torch.eye(features, dtype=promote(x[:0]).dtype, device=x.device)
    return orthonormalise(x.T) if rank >= tokens else None


def _draw(energies: Tensor | None, total: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """`count` distinct indices below `total`, uniform or in proportion to `energies`, without waiting for them."""
    keys = torch.rand(total, device=device, generator=generator).clamp_min_(1e-20)
    keys = keys.log_().neg_().log_().neg_()
    if energies is not None:  # Gumbel top-k; zero energies sort last
        keys += energies.to(keys.dtype).clamp_min(1e-30).log()
    return keys.nan_to_num_(0.0).topk(count).indices


def _refine(x: Tensor, y: Tensor, rank: int, power: int) -> Tensor:
    """Orthonormal basis (n, rank) from a sketch y (n, l): power iterations, then the best `rank` of l columns."""
    q = orthonormalise(y)
    for _ in range(power):
        q = orthonormalise(x.T @ (x @ q))
    if q.shape[1] == rank:
        return q
    c = x @ q
    return q @ leading_eigenvectors(c.T @ c, rank)
