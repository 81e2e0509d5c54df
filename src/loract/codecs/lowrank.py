"""Low-rank activation compression: X ~ C P^T with P (n, k) orthonormal and C = X P (N, k).

Source: Shi et al. 2025, LoRAct, arXiv:2509.23472 (sampling-based orthogonal decomposition, online, no calibration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loract.bounds import posterior_error, posterior_floor
from loract.codecs.base import Packed, State, Stored, bind_all, tokens_features
from loract.codecs.exact import Exact
from loract.codecs.quantized import Quantized
from loract.device import generator as seeded
from loract.errors import InvalidSpec
from loract.linalg import promote, row_chunks, row_energies, squared_norm
from loract.rangefinder import RangeFinder, Sampled, resolve_rank

BASIS_BITS = 8
"""Bits of a quantised basis: it has n rows to C's N, and an error in it is common to all tokens."""

GROWTH = 1.5
"""Factor by which a rank that misses its tolerance grows from one step to the next."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Keep C (N, k) and P (n, k) in the activation's dtype: k (N + n) values instead of N n.

    `rank`: int = columns, float in (0, 1] = share of n. `tolerance`: relative error to hold; the rank then starts
    at `rank` and follows the spectra seen in earlier steps, so that no shape waits for this step's data.
    `factor_bits` (2 to 8): keep C in so many bits and P in 8, with one scale per component (`Quantized` by channel):
    about k (N factor_bits / 8 + n) bytes. The reported error includes this rounding.
    `guard`: keep exactly what would not shrink.

    Example:
        >>> x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 32)
        >>> packed = LowRank(rank=2).encode(x, torch.Generator().manual_seed(0))
        >>> bool((packed.decode() - x).norm() < 1e-4 * x.norm()), packed.nbytes
        (True, 768)
        >>> LowRank(rank=2, factor_bits=8).encode(x).nbytes  # 2 (64 + 32) codes and 4 scales
        208
    """

    rank: int | float = 0.125
    tolerance: float | None = None
    sampler: RangeFinder = field(default_factory=Sampled)
    factor_bits: int | None = None
    guard: bool = True

    def __post_init__(self) -> None:
        """Validate what does not depend on the tensor's size.

        Raises:
            InvalidSpec: a rank that is no positive number or ratio in (0, 1], a tolerance outside (0, 1), or factors
                of fewer than 2 or more than 8 bits.
        """
        resolve_rank(self.rank, max(1 << 30, self.rank) if isinstance(self.rank, int) else 1 << 30)
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise InvalidSpec(f"tolerance {self.tolerance!r}", "a relative error in (0, 1)", "try tolerance=0.1")
        if self.factor_bits is not None and (isinstance(self.factor_bits, bool) or self.factor_bits not in range(2, 9)):
            got = f"factor_bits={self.factor_bits!r}"
            raise InvalidSpec(got, "None or an integer from 2 to 8", "use factor_bits=8")

    def _rank(self, tokens: int, features: int, state: State | None = None) -> int:
        rank = resolve_rank(self.rank, features) if state is None or state.rank is None else state.rank
        return max(1, min(rank, tokens, features))

    def _shrinks(self, rank: int, tokens: int, features: int, dtype: torch.dtype) -> bool:
        if self.factor_bits is None:
            return rank * (tokens + features) < tokens * features
        codes = tokens * -(-rank * self.factor_bits // 8) + features * -(-rank * BASIS_BITS // 8)
        return codes + 2 * rank * max(4, dtype.itemsize) < tokens * features * dtype.itemsize

    def codes(self, tokens: int, features: int, dtype: torch.dtype) -> bool:
        """Whether C and P take fewer bytes than x at the configured rank, or `guard` is off; never for integers."""
        if not dtype.is_floating_point or tokens == 0 or features == 0:
            return False
        if self.guard and isinstance(self.rank, float) and round(self.rank * features) == 0:  # too narrow for a share
            return False
        return not self.guard or self._shrinks(self._rank(tokens, features), tokens, features, dtype)

    def encode(self, x: Tensor, generator: torch.Generator | None = None, state: State | None = None) -> Packed:
        """Pack x (..., n); draws from `generator` (on x's device; seed 0 if None)."""
        tokens, features = tokens_features(x)
        if not self.codes(tokens, features, x.dtype):
            return Exact().encode(x)
        rank = self._rank(tokens, features, state)
        if self.guard and not self._shrinks(rank, tokens, features, x.dtype):
            return Exact().encode(x)
        x = x.detach().reshape(tokens, features)
        generator = generator or seeded(x.device, 0)
        energies = row_energies(x)
        basis = self.sampler.basis(x, rank, generator, energies=energies)
        kept = basis.to(x.dtype)
        coefficients = x @ kept
        total = energies.sum()
        error = posterior_error(total, squared_norm(coefficients)).clamp_min(posterior_floor(x.dtype))
        if self.tolerance is not None and state is not None:
            self._follow(coefficients, total, features, state)
        if self.factor_bits is not None:
            return self._coded(coefficients, kept, error, total)
        return LowRankPacked(kept=(coefficients, kept), shape=(tokens, features), dtype=x.dtype, error=error)

    def _coded(self, coefficients: Tensor, basis: Tensor, error: Tensor, total: Tensor) -> Packed:
        """Both factors quantised. The errors of C, of P and of the projection are orthogonal but for chance."""
        assert self.factor_bits is not None
        left = Quantized(bits=self.factor_bits, scale="channel", guard=False).encode(coefficients)
        right = Quantized(bits=BASIS_BITS, scale="channel", guard=False).encode(basis)
        decoded = left.decode()
        rounding = squared_norm(coefficients - decoded)
        # ||C (P - P')^T||^2, in which the cross terms between components average out.
        rounding = rounding + _column_energies(decoded) @ _column_energies(basis - right.decode())
        share = rounding / total.clamp_min(torch.finfo(total.dtype).tiny)
        error = (error.square() + share.to(error.dtype)).sqrt()
        shape = (len(coefficients), len(basis))
        return CodedFactors(factors=(left, right), shape=shape, dtype=basis.dtype, error=error)

    def _follow(self, coefficients: Tensor, total: Tensor, features: int, state: State) -> None:
        """Choose the next step's rank from the energies of earlier steps (components come sorted by energy)."""
        assert self.tolerance is not None
        if (seen := state.spectrum.read()) is not None and bool(torch.isfinite(seen).all()):
            missing = 1 - seen[:-1].cumsum(0) / seen[-1].clamp_min(torch.finfo(seen.dtype).tiny)
            enough = (missing > self.tolerance**2).sum().item() + 1
            count = len(seen) - 1
            state.rank = min(features, int(enough) if enough <= count else self._grown(count, coefficients, features))
        energies = promote(coefficients).square().sum(0).sort(descending=True).values
        state.spectrum.write(torch.cat([energies, total.reshape(1).to(energies.dtype)]))

    def _grown(self, rank: int, coefficients: Tensor, features: int) -> int:
        """The next rank after one that missed its tolerance, without jumping over the last that shrinks the tensor."""
        grown, tokens = int(rank * GROWTH) + 1, len(coefficients)
        if not self.guard or not self._shrinks(rank, tokens, features, coefficients.dtype):
            return grown
        shrinking = (r for r in range(grown, rank, -1) if self._shrinks(r, tokens, features, coefficients.dtype))
        return next(shrinking, grown)


def _column_energies(x: Tensor) -> Tensor:
    """Squared norm of each column of x (N, k): (k,), in fp32 or wider."""
    out = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    for part in row_chunks(x):
        out += promote(x[part]).square().sum(0)
    return out


class LowRankPacked(Stored):
    """C (N, k) and P (n, k); gradients are contracted in factor space."""

    factored = True

    def decode(self) -> Tensor:
        """C P^T (N, n)."""
        coefficients, basis = self.kept
        return coefficients @ basis.T

    def contract(self, g: Tensor) -> Tensor:
        """(g^T C) P^T: r k (N + n) multiplications instead of r N n, and X is never rebuilt."""
        coefficients, basis = self.kept
        g = promote(g)
        return (g.T @ coefficients.to(g.dtype)) @ basis.to(g.dtype).T

    def linear(self, weight: Tensor) -> Tensor:
        """C (W P)^T."""
        coefficients, basis = self.kept
        return coefficients @ (weight.to(basis.dtype) @ basis).T

    def rows(self, part: slice) -> Packed:
        """C[part] and P."""
        coefficients, basis = self.kept
        part_kept = coefficients[part]
        return LowRankPacked(kept=(part_kept, basis), shape=(len(part_kept), self.shape[1]), dtype=self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedFactors(Packed):
    """C and P, each in a representation of its own; a reader decodes them, never X."""

    factors: tuple[Packed, Packed]
    shape: tuple[int, int]
    dtype: torch.dtype
    error: Tensor | None = None
    factored = True

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(t for factor in self.factors for t in factor.tensors)

    def bind(self, tensors: Sequence[Tensor | None]) -> Packed:  # noqa: D102
        left, right = bind_all(self.factors, tensors)
        return replace(self, factors=(left, right))

    def plain(self) -> LowRankPacked:
        """The same X with its factors decoded."""
        left, right = self.factors
        return LowRankPacked(kept=(left.decode(), right.decode()), shape=self.shape, dtype=self.dtype)

    def decode(self) -> Tensor:
        """C P^T (N, n)."""
        return self.plain().decode()

    def contract(self, g: Tensor) -> Tensor:
        """(g^T C) P^T."""
        return self.plain().contract(g)

    def linear(self, weight: Tensor) -> Tensor:
        """C (W P)^T."""
        return self.plain().linear(weight)

    def rows(self, part: slice) -> Packed:
        """C[part] and P."""
        left, right = self.factors
        left = left.rows(part)
        return replace(self, factors=(left, right), shape=(left.shape[0], self.shape[1]), error=None)
