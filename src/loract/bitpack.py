"""Packing of 1- to 8-bit integers into bytes, row by row. Pure functions."""

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
    rows, cols = codes.shape
    if bits == 8:
        return codes
    nbytes = -(-cols * bits // 8)
    if 8 % bits == 0:
        per = 8 // bits
        lanes = pad(codes, (0, nbytes * per - cols)).reshape(rows, nbytes, per)
        out = lanes[..., 0].clone()
        for lane in range(1, per):
            out |= lanes[..., lane] << (lane * bits)
        return out
    # Eight codes fill `bits` bytes: each code spans at most two of them.
    groups = -(-cols // 8)
    lanes = pad(codes, (0, groups * 8 - cols)).reshape(rows, groups, 8)
    out = torch.zeros(rows, groups, bits, dtype=torch.uint8, device=codes.device)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        out[..., byte] |= lanes[..., lane] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= lanes[..., lane] >> (8 - shift)
    return out.reshape(rows, groups * bits)[:, :nbytes].contiguous()


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The codes (rows, cols) uint8 that `pack` packed."""
    _check(bits)
    if bits == 8:
        return packed
    rows, nbytes = packed.shape
    mask = 2**bits - 1
    if 8 % bits == 0:
        lanes = [(packed >> (lane * bits)) & mask for lane in range(8 // bits)]
        return torch.stack(lanes, dim=-1).reshape(rows, nbytes * (8 // bits))[:, :cols]
    groups = -(-cols // 8)
    lanes8 = pad(packed, (0, groups * bits - nbytes)).reshape(rows, groups, bits)
    out = torch.empty(rows, groups, 8, dtype=torch.uint8, device=packed.device)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        value = lanes8[..., byte] >> shift
        if shift + bits > 8:
            value = value | (lanes8[..., byte + 1] << (8 - shift))
        out[..., lane] = value & mask
    return out.reshape(rows, groups * 8)[:, :cols]


def _check(bits: int) -> None:
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise InvalidSpec(f"bits={bits!r}", "an integer from 1 to 8", "use bits=8 or bits=4")
