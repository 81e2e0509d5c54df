"""Numbers by their bits: packing of 1- to 8-bit integers into bytes, rounding to them, magnitudes. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from loract.errors import InvalidSpec


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, cols) uint8 below 2^bits -> (rows, ceil(cols bits / 8)) uint8, least significant bits first.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
        tensor([[33,  3]], dtype=torch.uint8)
    """
    _check(bits)
    if bits == 8:
        return codes
    rows, cols = codes.shape
    nbytes, groups = -(-cols * bits // 8), -(-cols // 8)
    if not codes.numel():
        return codes.new_empty(rows, nbytes)
    lanes = _padded(codes, groups * 8).view(torch.int64)
    # Eight codes are one integer: its lanes are moved together in pairs, then fours, then eights, because shifting
    # every eighth byte by itself costs strided passes over the whole tensor.
    for lane, width in _stages(bits):
        high = (lanes >> (lane - width)).bitwise_and_(_pattern(lane, width, width))
        lanes = high.bitwise_or_(lanes & _pattern(lane, width))
    if bits in _NARROW:
        out = lanes.to(_NARROW[bits]).view(torch.uint8)
    else:
        wide, out = lanes.view(torch.uint8), torch.empty(rows, groups * bits, dtype=torch.uint8, device=codes.device)
        for byte in range(bits):
            out[:, byte::bits] = wide[:, byte::8]
    return out if out.shape[1] == nbytes else out[:, :nbytes].contiguous()


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The codes (rows, cols) uint8 that `pack` packed."""
    _check(bits)
    if bits == 8:
        return packed
    rows, groups = packed.shape[0], -(-cols // 8)
    if not packed.numel():
        return packed.new_empty(rows, cols)
    packed = _padded(packed, groups * bits)
    if bits in _NARROW:
        # The sign that the wider integer inherits lies above all codes, and the masks remove it.
        lanes = packed.view(_NARROW[bits]).to(torch.int64)
    else:
        wide = torch.empty(rows, groups * 8, dtype=torch.uint8, device=packed.device)  # the masks clear the rest
        for byte in range(bits):
            wide[:, byte::8] = packed[:, byte::bits]
        lanes = wide.view(torch.int64)
    for lane, width in reversed(_stages(bits)):
        high = (lanes << (lane - width)).bitwise_and_(_pattern(lane, width, lane))
        lanes = high.bitwise_or_(lanes & _pattern(lane, width))
    return lanes.view(torch.uint8)[:, :cols]


_NARROW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integers exactly as wide as eight codes of so many bits."""


def _stages(bits: int) -> tuple[tuple[int, int], ...]:
    """(lane, width) of each halving: every 2 lane bits hold two numbers of width bits."""
    return (8, bits), (16, 2 * bits), (32, 4 * bits)


def _pattern(lane: int, width: int, shift: int = 0) -> int:
    """A mask of width ones, shifted, in every 2 lane bits of 64."""
    return sum(((1 << width) - 1) << (start + shift) for start in range(0, 64, 2 * lane))


def _padded(x: Tensor, cols: int) -> Tensor:
    """X (rows, at most cols) uint8 with zeros up to cols; contiguous and aligned, to be read as wider integers."""
    x = x if x.shape[1] == cols else pad(x, (0, cols - x.shape[1]))
    return x if x.is_contiguous() and x.storage_offset() % 8 == 0 else x.clone(memory_format=torch.contiguous_format)


def low_byte(values: Tensor, offset: int, bits: int) -> Tensor:
    """round(values) + offset as uint8, modulo 2^bits, ties to even; `values` (fp32 or fp64) are overwritten.

    Added to 1.5 * 2^23 (fp32), a number leaves its nearest integer in the low bits: a conversion of floats to bytes is
    scalar on CPU, and undefined for NaN, which gives some code here.

    Example:
        >>> low_byte(torch.tensor([-1.2, 0.0, 2.5]), 4, 3)
        tensor([3, 4, 6], dtype=torch.uint8)
    """
    fraction, integer = (23, torch.int32) if values.dtype == torch.float32 else (52, torch.int64)
    codes = values.add_(1.5 * 2.0**fraction + offset).view(integer).to(torch.uint8)
    return codes if bits == 8 else codes.bitwise_and_(2**bits - 1)


def absmax(x: Tensor, dim: int) -> Tensor:
    """Max |x| over `dim`, in x's own dtype; NaN if there is one.

    Without their sign, floats are ordered as their bits are, NaN above infinity: one pass over integers.

    Example:
        >>> absmax(torch.tensor([[-3.0, 1.0], [2.0, torch.nan]]), 0)
        tensor([3., nan])
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    return x.view(integer).bitwise_and(torch.iinfo(integer).max).amax(dim).view(x.dtype)


def _check(bits: int) -> None:
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise InvalidSpec(f"bits={bits!r}", "an integer from 1 to 8", "use bits=8 or bits=4")
