"""Low-rank activation compression: X ~ C P^T with P (n, k) orthonormal and C = X P (N, k).

Source: Shi et al. 2025, LoRAct, arXiv:2509.23472 (sampling-based orthogonal decomposition, online, no calibration).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loract.bounds import posterior_error, posterior_floor
from loract.codecs.base import Packed, State, Stored, tokens_features
from loract.codecs.exact import Exact
from loract.errors import InvalidSpec
from loract.linalg import promote, row_energies, squared_norm
from loract.rangefinder import RangeFinder, Sampled, resolve_rank

GROWTH = 1.5
"""Factor by which a rank that misses its tolerance grows from one step to the next."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Keep C (N, k) and P (n, k) in the activation's dtype: k (N + n) values instead of N n.

    `rank`: int = columns, float in (0, 1] = share of n. `tolerance`: relative error to hold; the rank then starts
    at `rank` and follows the spectra seen in earlier steps, so that no shape waits for this step's data.
    `guard`: keep exactly what would not shrink.

    Example:
        >>> x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 32)
        >>> packed = LowRank(rank=2).encode(x, torch.Generator().manual_seed(0))
        >>> bool((packed.decode() - x).norm() < 1e-4 * x.norm()), packed.nbytes
        (True, 768)
    """

    rank: int | float = 0.125
    tolerance: float | None = None
    sampler: RangeFinder = field(default_factory=Sampled)
    guard: bool = True

    def __post_init__(self) -> None:
        """Validate what does not depend on the tensor's size.

        Raises:
            InvalidSpec: a rank that is no positive number or ratio in (0, 1], or a tolerance outside (0, 1).
        """
        resolve_rank(self.rank, max(1 << 30, self.rank) if isinstance(self.rank, int) else 1 << 30)
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise InvalidSpec(f"tolerance {self.tolerance!r}", "a relative error in (0, 1)", "try tolerance=0.1")

    def _rank(self, tokens: int, features: int, state: State | None = None) -> int:
        rank = resolve_rank(self.rank, features) if state is None or state.rank is None else state.rank
        return max(1, min(rank, tokens, features))

    def codes(self, tokens: int, features: int, dtype: torch.dtype) -> bool:
        """Whether k (N + n) < N n at the configured rank, or `guard` is off; never for integer tensors."""
        if not dtype.is_floating_point or tokens == 0 or features == 0:
            return False
        return not self.guard or self._rank(tokens, features) * (tokens + features) < tokens * features

    def encode(self, x: Tensor, generator: torch.Generator | None = None, state: State | None = None) -> Packed:
        """Pack x (..., n); draws from `generator` (on x's device; seed 0 if None)."""
        tokens, features = tokens_features(x)
        if not self.codes(tokens, features, x.dtype):
            return Exact().encode(x)
        rank = self._rank(tokens, features, state)
        if self.guard and rank * (tokens + features) >= x.numel():
            return Exact().encode(x)
        x = x.detach().reshape(tokens, features)
        generator = generator or torch.Generator(x.device).manual_seed(0)
        energies = row_energies(x)
        basis = self.sampler.basis(x, rank, generator, energies=energies)
        kept = basis.to(x.dtype)
        coefficients = x @ kept
        total = energies.sum()
        error = posterior_error(total, squared_norm(coefficients)).clamp_min(posterior_floor(x.dtype))
        if self.tolerance is not None and state is not None:
            self._follow(coefficients, total, features, state)
        return LowRankPacked(kept=(coefficients, kept), shape=(tokens, features), dtype=x.dtype, error=error)

    def _follow(self, coefficients: Tensor, total: Tensor, features: int, state: State) -> None:
        """Choose the next step's rank from the energies of earlier steps (components come sorted by energy)."""
        assert self.tolerance is not None
        if (seen := state.spectrum.read()) is not None and bool(torch.isfinite(seen).all()):
            missing = 1 - seen[:-1].cumsum(0) / seen[-1].clamp_min(torch.finfo(seen.dtype).tiny)
            enough = (missing > self.tolerance**2).sum().item() + 1
            count = len(seen) - 1
            state.rank = min(
                features, int(enough) if enough <= count else self._grown(count, len(coefficients), features)
            )
        energies = promote(coefficients).square().sum(0).sort(descending=True).values
        state.spectrum.write(torch.cat([energies, total.reshape(1).to(energies.dtype)]))

    def _grown(self, rank: int, tokens: int, features: int) -> int:
        """The next rank after one that missed its tolerance, without jumping over the last that shrinks the tensor."""
        grown = int(rank * GROWTH) + 1
        largest = (tokens * features - 1) // (tokens + features)
        return min(grown, largest) if self.guard and rank < largest else grown


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
