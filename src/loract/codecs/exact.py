"""The identity codec: sharing and fusing alone, no loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loract.codecs.base import Packed, State, Stored, tokens_features


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

    def decode(self) -> Tensor:
        """X as (N, n)."""
        return self.kept[0].reshape(self.shape)
