"""The identity codec: sharing and fusing alone, no loss; and exact lines beside a lossy representation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loract.codecs.base import Packed, State, Stored, tokens_features
from loract.linalg import promote


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Keep the tensor itself, in its own dtype and layout: no copy is made, so other holders of it share the bytes.

    Example:
        >>> x = torch.ones(2, 3)
        >>> Exact().encode(x).decode().data_ptr() == x.data_ptr()
        True
    """

    def codes(self, tokens: int, features: int, dtype: torch.dtype) -> bool:
        """Never: the tensor is kept as it is."""
        return False

    def encode(self, x: Tensor, generator: torch.Generator | None = None, state: State | None = None) -> Packed:
        """Keep x (..., n)."""
        return ExactPacked(kept=(x,), shape=tokens_features(x), dtype=x.dtype)


class ExactPacked(Stored):
    """x itself. It keeps its own shape: flattening a permuted tensor here would copy it."""

    lossy = False

    def decode(self) -> Tensor:
        """X as (N, n)."""
        return self.kept[0].reshape(self.shape)

    def rows(self, part: slice) -> Packed:
        """A view of the rows; of a layout that cannot be flattened, a copy."""
        rows = self.decode()[part]
        return ExactPacked(kept=(rows,), shape=(len(rows), self.shape[1]), dtype=self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Patched(Packed):
    """Base of representations with some lines beside them that are exact: `kept` = (lines, index)."""

    inner: Packed
    kept: tuple[Tensor, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    error: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (*self.inner.tensors, *self.kept)

    def bind(self, tensors: Sequence[Tensor | None]) -> Packed:  # noqa: D102
        split = len(self.inner.tensors)
        return replace(self, inner=self.inner.bind(tensors[:split]), kept=tuple(tensors[split:]))


class ExactTokens(Patched):
    """Tokens (k, n) added to rows `index` (k,) of `inner`; rows beyond it are left out.

    The tokens are kept as they are where `inner` decodes to 0 there, else less what it decodes to.
    """

    @property
    def factored(self) -> bool:  # type: ignore[override]
        """As the representation of the rest."""
        return self.inner.factored

    def contract(self, g: Tensor) -> Tensor:
        """g^T X of both parts."""
        g = promote(g)
        lines, index = self.kept
        if self.shape[0] == 0:
            return self.inner.contract(g)
        here = (index >= 0) & (index < self.shape[0])
        own = torch.where(here[:, None], g[index.clamp(0, self.shape[0] - 1)], g.new_zeros(()))
        return self.inner.contract(g) + own.T @ lines.to(g.dtype)

    def linear(self, weight: Tensor) -> Tensor:
        """X W^T of both parts."""
        lines, index = self.kept
        last = self.shape[0] - 1
        if last < 0:
            return self.inner.linear(weight)
        here = (index >= 0) & (index <= last)
        own = lines.to(self.dtype) @ weight.to(self.dtype).T
        own = torch.where(here[:, None], own, torch.zeros_like(own))
        return self.inner.linear(weight).index_add_(0, index.clamp(0, last), own)

    def decode(self) -> Tensor:
        """X (N, n). A feature that is lost in `inner` (NaN) stays lost in every token."""
        lines, index = self.kept
        out, last = self.inner.decode(), self.shape[0] - 1
        if last < 0:
            return out
        here = (index >= 0) & (index <= last)
        return out.index_add_(0, index.clamp(0, last), torch.where(here[:, None], lines, torch.zeros_like(lines)))

    def rows(self, part: slice) -> Packed:
        """All the exact tokens again, since how many of them lie in `part` is known on the device only."""
        lines, index = self.kept
        start, _, step = part.indices(self.shape[0])
        moved = torch.where((index - start) % step == 0, (index - start) // step, torch.full_like(index, -1))
        inner = self.inner.rows(part)
        return replace(self, inner=inner, kept=(lines, moved), shape=inner.shape)


class ExactFeatures(Patched):
    """Features (N, k) beside an `inner` of the other n - k; `index` (n,) tells where all go, those of `inner` first."""

    def decode(self) -> Tensor:
        """X (N, n)."""
        lines, index = self.kept
        coded, exact = index.long().split([len(index) - lines.shape[1], lines.shape[1]])
        out = torch.empty(self.shape, dtype=self.dtype, device=lines.device)
        return out.index_copy_(1, coded, self.inner.decode()).index_copy_(1, exact, lines)

    def rows(self, part: slice) -> Packed:
        """The rows of both."""
        lines, index = self.kept
        inner = self.inner.rows(part)
        return replace(self, inner=inner, kept=(lines[part], index), shape=(inner.shape[0], self.shape[1]))
