"""Adam's moments, in fp32 or in 8 bits with a scale a row, as tensors in a dictionary that an optimiser saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from loract.bitpack import absmax, low_byte

Coded = tuple[Tensor, Tensor, Tensor]
"""Codes (rows, columns) uint8, and two numbers a row (rows, 1) fp32."""


def encode_signed(x: Tensor) -> Coded:
    """A first moment, in 255 even steps from -max |x| to max |x| of its row: off by at most half a step.

    Example:
        >>> codes, scale, _ = encode_signed(torch.tensor([[-2.0, 0.0, 0.5]]))
        >>> codes.tolist(), round(float(scale) * 127, 4)
        ([[1, 128, 160]], 2.0)
    """
    scale = absmax(x, 1)[:, None] / 127
    codes = low_byte(x / scale.clamp_min(torch.finfo(x.dtype).tiny), 128, 8)
    return codes, scale, torch.zeros_like(scale)


def decode_signed(coded: Coded) -> Tensor:
    """The first moment again."""
    codes, scale, _ = coded
    return (codes.to(scale.dtype) - 128) * scale


def encode_positive(x: Tensor) -> Coded:
    """A second moment, in 255 even steps of its logarithm from the row's least to its greatest value.

    Even steps of the value itself would round small moments to zero, by whose root Adam divides. Here the relative
    error is at most 2^(s/2) - 1 for a step of s octaves: .3 % where a row spans two octaves, 15 % where it spans 100.

    Example:
        >>> x = torch.tensor([[1e-12, 3e-7, 1.0]])
        >>> bool((decode_positive(encode_positive(x)) / x - 1).abs().max() < 0.06)
        True
    """
    octaves = x.clamp_min(torch.finfo(x.dtype).tiny).log2_()
    low, high = octaves.amin(1, keepdim=True), octaves.amax(1, keepdim=True)
    step = (high - low) / 255
    codes = low_byte((octaves - low) / step.clamp_min(torch.finfo(x.dtype).tiny), 0, 8)
    return codes, low, step


def decode_positive(coded: Coded) -> Tensor:
    """The second moment again; what was zero is the least normal number."""
    codes, low, step = coded
    return torch.exp2(low + codes.to(low.dtype) * step)


Part = slice | EllipsisType
"""Some rows, or all of a tensor of any shape."""


def allocate(shape: Sequence[int], bits: int, like: Tensor) -> dict[str, Tensor]:
    """Room for both moments of this shape, in 8 bits (two dimensions) or in `like`'s dtype; what is in it is undefined.

    Example:
        >>> state = allocate((2, 4), 8, torch.ones(1))
        >>> write(state, slice(0, 1), torch.ones(1, 4), torch.full((1, 4), 2.0))
        >>> read(state, slice(0, 1))[1]
        tensor([[2., 2., 2., 2.]])
    """
    if bits == 32:
        return {name: torch.zeros(tuple(shape), dtype=like.dtype, device=like.device) for name in ("first", "second")}
    state: dict[str, Tensor] = {}
    for name in ("first", "second"):
        state[name] = torch.zeros(tuple(shape), dtype=torch.uint8, device=like.device)
        for scale in _SCALES:
            state[name + scale] = torch.zeros(shape[0], 1, dtype=like.dtype, device=like.device)
    return state


_SCALES = ("_scale", "_step")


def read(state: Mapping[str, Tensor], part: Part) -> tuple[Tensor, Tensor]:
    """Both moments of some rows, as values of their own."""
    if state["first"].dtype != torch.uint8:
        return state["first"][part].clone(), state["second"][part].clone()
    first, second = (
        (state[name][part], state[name + "_scale"][part], state[name + "_step"][part]) for name in ("first", "second")
    )
    return decode_signed(first), decode_positive(second)


def write(state: Mapping[str, Tensor], part: Part, first: Tensor, second: Tensor) -> None:
    """Keep both moments of some rows."""
    if state["first"].dtype != torch.uint8:
        state["first"][part], state["second"][part] = first, second
        return
    for name, coded in (("first", encode_signed(first)), ("second", encode_positive(second))):
        for suffix, tensor in zip(("", *_SCALES), coded, strict=True):
            state[name + suffix][part] = tensor
