"""Uniform affine quantisation in groups along the features: x ~ low + step * code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loract.bitpack import pack, unpack
from loract.codecs.base import Packed, State, Stored, tokens_features
from loract.codecs.exact import Exact
from loract.errors import InvalidSpec
from loract.linalg import promote


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Keep `bits`-bit codes (1 to 8) with one low and one step per `group` features of a token.

    Per value |x - decode()| <= step / 2 with step = range / (2^bits - 1), plus the rounding of low and step to x's
    dtype; with `stochastic` rounding <= step, and unbiased. A group that holds a NaN or an infinity decodes to NaN.

    Example:
        >>> x = torch.linspace(-1, 1, 64).reshape(1, 64)
        >>> packed = Quantized(bits=8, group=64).encode(x)
        >>> bool((packed.decode() - x).abs().max() <= 1.01 / 255), packed.nbytes
        (True, 72)
    """

    bits: int = 8
    group: int = 64
    stochastic: bool = False
    guard: bool = True

    def __post_init__(self) -> None:
        """Validate the configuration.

        Raises:
            InvalidSpec: bits outside 1..8 or a group below 2.
        """
        if isinstance(self.bits, bool) or self.bits not in range(1, 9):
            raise InvalidSpec(f"bits={self.bits!r}", "an integer from 1 to 8", "use bits=8 or bits=4")
        if isinstance(self.group, bool) or self.group < 2:
            raise InvalidSpec(f"group={self.group!r}", "at least 2 values per group", "use group=64")

    def _bytes(self, tokens: int, features: int, itemsize: int) -> int:
        group = min(self.group, features)
        groups = -(-features // group)
        return tokens * (-(-groups * group * self.bits // 8) + 2 * groups * itemsize)

    def codes(self, tokens: int, features: int, dtype: torch.dtype) -> bool:
        """Whether the codes and scales take fewer bytes than x, or `guard` is off; never for integer tensors."""
        if not dtype.is_floating_point or tokens == 0 or features == 0:
            return False
        return not self.guard or self._bytes(tokens, features, dtype.itemsize) < tokens * features * dtype.itemsize

    def encode(self, x: Tensor, generator: torch.Generator | None = None, state: State | None = None) -> Packed:
        """Pack x (..., n); `generator` is read only for stochastic rounding (seed 0 if None)."""
        tokens, features = tokens_features(x)
        if not self.codes(tokens, features, x.dtype):
            return Exact().encode(x)
        x = x.detach().reshape(tokens, features)
        group = min(self.group, features)
        if short := -features % group:  # repeat the last column: zeros would widen the last group's range
            x = torch.cat([x, x[:, -1:].expand(tokens, short)], dim=1)
        values = promote(x).reshape(tokens, -1, group)
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        # Quantise against low and step as they are stored, so that their rounding is not a second error.
        scale = torch.bfloat16 if x.dtype == torch.float16 else x.dtype  # fp16 steps go subnormal and ranges overflow
        low, step = low.to(scale), ((high - low) / (2**self.bits - 1)).to(scale)
        safe = torch.where(step == 0, torch.ones_like(step), step)
        levels = (values - low.to(values.dtype)) / safe.to(values.dtype)
        if self.stochastic:
            generator = generator or torch.Generator(x.device).manual_seed(0)
            noise = torch.rand(levels.shape, dtype=levels.dtype, device=levels.device, generator=generator)
            levels = (levels + noise).floor_()
        else:
            levels = levels.round_()
        # A non-finite group has a non-finite step: its codes do not matter, NaN * code is NaN.
        codes = levels.nan_to_num_(0.0).clamp_(0, 2**self.bits - 1).to(torch.uint8).reshape(tokens, -1)
        step = torch.where(torch.isfinite(step) & torch.isfinite(low), step, torch.full_like(step, torch.nan))
        kept = (pack(codes, self.bits), low.squeeze(-1), step.squeeze(-1))
        return QuantizedPacked(kept=kept, shape=(tokens, features), dtype=x.dtype, bits=self.bits, group=group)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedPacked(Stored):
    """Codes (N, bytes), low and step (N, groups)."""

    bits: int
    group: int

    def decode(self) -> Tensor:
        """Low + step * code (N, n)."""
        codes, low, step = self.kept
        tokens, features = self.shape
        groups = low.shape[1]
        values = unpack(codes, self.bits, groups * self.group).reshape(tokens, groups, self.group)
        scaled = promote(step).unsqueeze(-1) * values + promote(low).unsqueeze(-1)
        return scaled.reshape(tokens, -1)[:, :features].to(self.dtype)
